# SPDX-License-Identifier: BSD-3-Clause
"""popcon: which installed libraries do people really use, and which does nobody?

When a Python process ends, popcon works out which installed libraries were
imported in it, and adds one to a global counter for each, over the statsd
protocol. One UDP datagram like this is all that leaves the process:

    python_popcon.library_used.numpy:1|c
    python_popcon.library_used.pandas:1|c

No user, no process, no time, no file name, nothing of a person's own code.

Switch it on with `python popcon.py install`, or at the top of a script with `import popcon;
popcon.setup_reporter()`, and by telling it where the statsd server is. Switch it off by
leaving the host empty, with DO_NOT_TRACK=1, or with `python -m popcon uninstall`.

    PYTHON_POPCONTEST_STATSD_HOST         name or address; nothing is sent without it
    PYTHON_POPCONTEST_STATSD_PORT         default 9125
    PYTHON_POPCONTEST_STATSD_PREFIX       default python_popcon.library_used
    PYTHON_POPCONTEST_STATSD_SAMPLE_RATE  share of processes that report; default 1
    PYTHON_POPCONTEST_DEBUG               set to 1: says on stderr what was sent, or why nothing was
    DO_NOT_TRACK                          set, and not 0: nothing is ever sent

The file reads along the way of the data, from sys.modules to the socket; then who calls that,
and when. What comes after "the command line" is run by those alone who type a command.
"""

# Every process pays for these, but a bare interpreter has loaded them all; see standard().
import _thread
import atexit
import os
import sys

if sys.hexversion < 0x030A0000:
    _failure = SystemExit if __name__ == "__main__" else ImportError
    raise _failure("popcon needs Python 3.10 or later")

from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import PathFinder, SourceFileLoader, SourcelessFileLoader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, NoReturn
    Claims = Iterator[tuple[str, Iterable[bytes]]]  # a library, and which paths are its own

__version__ = "2.0.0"
__all__ = ["report", "setup_reporter", "used_libraries"]


# ---- sys.modules -> the files that were executed ------------------------------------

FOLDER = os.path.dirname(getattr(os, "__file__", "none"))
STANDARD = FOLDER, os.path.join(FOLDER, "lib-dynload"), os.path.join(sys.base_prefix, "DLLs")
OWN_LOADERS = "builtins", "_frozen_importlib", "_frozen_importlib_external", "zipimport"

# Reads a module's namespace without asking the module, which may be lazy and would wake.
namespace_of = vars(type(sys))["__dict__"].__get__


def executed_files(modules: "Mapping[Any, object]") -> "set[str]":
    """Return the files of those modules that were executed, but for the standard library's."""
    files = set()
    lazy = getattr(sys.modules.get("importlib.util"), "_LazyModule", ())
    for name, module in modules.items():
        if type(name) is str and name.partition(".")[0] not in sys.stdlib_module_names:
            try:
                files.add(None if issubclass(type(module), lazy) else executed_file(name, module))
            except Exception as error:
                debug(f"cannot tell the file of {name}: {error!r}")
    return {file for file in files if file and file.rpartition(os.sep)[0] not in STANDARD}


def executed_file(name: str, module: object) -> "Any":
    """Return the file of a module, or its name; None if it was not executed, or is of nobody."""
    namespace = namespace_of(module) if issubclass(type(module), type(sys)) else {}
    spec, file = namespace.get("__spec__"), namespace.get("__file__")
    if type(spec) is ModuleSpec:
        # *-nspkg.pth files make modules of a source that nobody executes: exec() leaves a mark
        # in the namespace, import in the spec.
        is_marked = "__builtins__" in namespace or hasattr(spec, "_initializing")
        if not is_marked and type(spec.loader) in (SourceFileLoader, SourcelessFileLoader):
            return None
        if file is not spec.origin and spec.has_location and (file is None or spec.name is name):
            file = spec.origin  # whatever the module made of __file__, as tlz does
        if file is None and "." not in name and type(spec.loader).__module__ not in OWN_LOADERS:
            return name  # it has no file, but a loader of somebody's own
    elif name in ("__main__", "__mp_main__"):
        return None  # a script, somebody's own; run with -m it has a spec
    elif file is None and "." not in name and type(module) is not type(sys) and module is not None:
        # A module put an object in its own place, as sh does. To look for it executes nothing.
        spec = PathFinder.find_spec(name)
        file = spec and spec.origin
    # No "<string>"; what no file can be named makes os.fsencode() raise.
    return file if type(file) is str and os.sep in file and os.fsencode(file) else None


# ---- files -> the libraries that own them -------------------------------------------

def owners(files: "set[str]", new: "set[str]") -> "dict[str, set[str]]":
    """Map the libraries that own some of the files to these, where new ones were imported from."""
    found: dict[str, set[str]] = {}
    rest = set(files)  # nobody's so far
    # In order of trust: the next is asked for what is still nobody's.
    trusted = claims_by_record, claims_by_package_manager, claims_by_name
    roots = [*import_roots(new), ""]  # the last for what lies nowhere
    for claims in (*trusted, claims_in_archive, claims_by_finders):
        for root in [] if new.isdisjoint(rest) else roots:
            paths = paths_below(root, rest)
            if new.isdisjoint(paths.values()):
                continue
            try:
                for library, listed in claims(root, paths):
                    if library and listed:
                        found.setdefault(library, set()).update([paths[path] for path in listed])
            except Exception as error:
                debug(f"cannot tell whose {[*paths][:3]} and others are: {error!r}")
            rest.difference_update(*found.values())
    return found


def import_roots(files: "Iterable[str]") -> "list[str]":
    """Return the folders and archives out of which files were imported, outer ones first."""
    above: set[str] = set()
    for folder in files:
        while folder and folder not in above:
            above.add(folder)
            folder = folder.rpartition(os.sep)[0]
    # A finder knows in full what is relative on sys.path.
    full = {entry: getattr(f, "path", entry) for entry, f in dict(sys.path_importer_cache).items()}
    on_path = {full.get(e, e).rstrip(os.sep) for e in sys.path or () if type(e) is str}
    roots: list[str] = []
    for root in sorted(above & {*on_path, *full.values()}, key=len):
        # Python searches packages, too: these lie in a root.
        if root in on_path or not root.startswith(tuple([outer + os.sep for outer in roots])):
            roots.append(root)
    return roots


def metadata_in(root: str) -> "list[str]":
    """Return the paths of the metadata folders or files (PEP 376) in the folder."""
    # Python has listed the folder when it imported from there: no need to do so again.
    names = getattr(sys.path_importer_cache.get(root), "_path_cache", None)
    try:
        names = names or (root and os.listdir(root))
    except (OSError, ValueError):
        return []  # an archive, gone, or no path at all
    endings = ".dist-info", ".egg-info", "EGG-INFO"
    return [f"{root}{os.sep}{name}" for name in names if name.endswith(endings)]


def paths_below(root: str, files: "Iterable[str]") -> "dict[bytes, str]":
    """Map the path below the root, as RECORD has it, to the file, for each that lies there."""
    start = root and root + os.sep
    below = [file for file in files if file.startswith(start)]
    paths = {os.fsencode(file[len(start) :].replace(os.sep, "/")): file for file in below}
    # Where bytecode took the place of sources, RECORD lists the sources all the same.
    return {**paths, **{path[:-1]: paths[path] for path in paths if path.endswith(b".pyc")}}


def claims_by_record(root: str, paths: "Mapping[bytes, str]") -> "Claims":
    """Yield each library with those of the paths that its RECORD lists (PEP 376, PEP 627)."""
    infos, wanted, starts = metadata_in(root), {*paths}, {path[:4] for path in paths}
    if not infos:
        return
    may_list: Callable[[bytes], object] = len
    try:
        # Most need not be taken apart: a line's first four bytes tell, each by four classes.
        re, ordered, size = standard("re"), sorted(starts), len(starts) // 4 + 1
        groups = [ordered[at : at + size] for at in range(0, len(starts), size)]
        classes = [b"".join([b"[%b]" % re.escape(bytes(c)) for c in zip(*one)]) for one in groups]
        may_list = re.compile(b'\n(?:"|%b)' % b"|".join(classes)).search
    except Exception as error:  # somebody's own re.py is loaded, or an enum.py with which re fails
        debug(f"all RECORDs are taken apart: {error!r}")
    for info in infos:
        record = read(f"{info}{os.sep}RECORD")
        if record[:4] in starts or record[:1] == b'"' or may_list(record):
            listed = wanted.intersection(listed_paths(record))
            if listed:
                yield library_name(info), listed


def listed_paths(record: bytes) -> "list[bytes]":
    """Return the paths that a RECORD lists: of each line the first field, as CSV has it."""
    lines = record.replace(b"\r", b"").split(b"\n")
    if b'"' not in record:  # as pip writes it
        return [line.partition(b",")[0] for line in lines]
    ends = [(line[1:], b'",') if line[:1] == b'"' else (line, b",") for line in lines]
    return [(line + b",").partition(end)[0].replace(b'""', b'"') for line, end in ends]


def claims_by_package_manager(root: str, paths: "Mapping[bytes, str]") -> "Claims":
    """Yield each library without RECORD with the paths in one package of dpkg's or conda's."""
    bare = [info for info in metadata_in(root) if not os.path.isfile(f"{info}{os.sep}RECORD")]
    lists = [("/var/lib/dpkg/info", "python3-", f"\n{root}/", b"\n")]
    for prefix in {sys.prefix, sys.base_prefix}:
        below = root[len(prefix) + 1 :].replace(os.sep, "/")
        lists.append((os.path.join(prefix, "conda-meta"), "", f'"{below}/', b'"'))
    for folder, begin, before, end in lists if bare else ():
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if name.startswith(begin) and name.endswith((".list", ".json")):
                package, start = read(os.path.join(folder, name)), os.fsencode(before)
                inside = [i for i in bare if start + os.fsencode(os.path.basename(i)) in package]
                held = [path for path in paths if inside and start + path + end in package]
                for info in inside:
                    yield library_name(info), held


def claims_by_name(root: str, paths: "Mapping[bytes, str]") -> "Claims":
    """Yield each library without RECORD with a path to which top_level.txt leads, or its name."""
    tops = {}  # only where libraries get installed: elsewhere an egg-info is a source tree
    for info in metadata_in(root) if root.endswith(("-packages", ".egg")) else ():
        if not os.path.isfile(f"{info}{os.sep}RECORD"):
            tops[library_name(info)] = text_of(f"{info}{os.sep}top_level.txt").split()
    for path in paths if tops else ():
        parts = os.fsdecode(path).partition(".")[0].split("/")
        leads = {normalized("-".join(parts[:end])) for end in range(1, len(parts) + 1)}
        able = [name for name, top in tops.items() if (parts[0] in top if top else name in leads)]
        # Many may share a top-level name: then google-auth owns what is in google/auth.
        own = [name for name in able if name in leads or name in parts]
        for library in [max(own, key=len)] if own else able:
            yield library, [path]


def claims_in_archive(root: str, paths: "Mapping[bytes, str]") -> "Claims":
    """Yield each library in a zip file with those of the paths to which its files or names lead."""
    metadata: Any = os.path.isfile(root) and standard("importlib.metadata")
    for distribution in metadata.distributions(path=[root]) if metadata else ():
        try:
            name = normalized(distribution.metadata["Name"] or "")
            listed = {os.fsencode(str(file)) for file in distribution.files or ()}
            tops = (distribution.read_text("top_level.txt") or name.replace("-", "_")).split()
            starts = tuple([os.fsencode(top + end) for top in tops for end in "/."])
            yield name, [p for p in paths if (p in listed if listed else p.startswith(starts))]
        except Exception as error:
            debug(f"cannot read a library in {root}: {error!r}")


def claims_by_finders(root: str, paths: "Mapping[bytes, str]") -> "Claims":
    """Yield each library with the modules without a file that somebody's own finder knows."""
    names = {name: path for path, name in paths.items() if os.sep not in name}
    if root or not names:
        return
    metadata = standard("importlib.metadata")
    # The others' class has this name, be it importlib.metadata's or a backport's.
    own = [d for d in metadata.distributions() if type(d).__name__ != "PathDistribution"]
    known = {normalized(d.metadata["Name"] or "") for d in own}
    libraries = metadata.packages_distributions() if known else {}
    for name in names.keys() & libraries.keys():
        for library in known.intersection(map(normalized, libraries[name])):
            yield library, [names[name]]


def library_name(info: str) -> str:
    """Return the library's name from its metadata, "" if it has none or is editable (PEP 610)."""
    if b'"editable":true' in b"".join(read(f"{info}{os.sep}direct_url.json").split()):
        return ""
    for path in (f"{info}{os.sep}METADATA", f"{info}{os.sep}PKG-INFO", info):
        header = read(path).replace(b"\r", b"").lstrip().partition(b"\n\n")[0]
        for line in header.split(b"\n"):
            if line[:5].lower() == b"name:":
                return normalized(line[5:].decode("utf-8", "replace"))
    return ""


def normalized(name: str) -> str:
    """Return the name as PEP 503 normalises it, "" if it is not a valid one, or endless."""
    words = name.strip().lower().replace("_", "-").replace(".", "-").split("-")
    is_valid = name.isascii() and "".join(words).isalnum() and len(name) <= 200
    return "-".join(filter(None, words)) if is_valid else ""


def shells_own(roots: "Iterable[str]") -> "set[str]":
    """Return IPython, ipykernel and all that they require: what that loads is nobody's choice."""
    re = standard("re")
    infos = [info for root in roots for info in metadata_in(root)]
    by_name = {normalized(re.split("-|[.]egg-info", os.path.basename(i))[0]): i for i in infos}
    own = ["ipython", "ipykernel"]
    for name in own:  # which grows
        header = text_of(f"{by_name.get(name, '')}{os.sep}METADATA").partition("\n\n")[0]
        needs = re.findall(r"(?m)^Requires-Dist: *([\w.-]+)(?!.*;.*\bextra\b)", header)
        own += {*map(normalized, needs)}.difference(own)
    return {*own}


class StandardFinder:
    """Lets one thread find the standard library's own modules, whatever other folders hold."""

    def __init__(self) -> None:
        self.thread = _thread.get_ident()

    def find_spec(self, name: str, path: object = None, _: object = None) -> "ModuleSpec | None":
        is_ours = path is None and self.thread == _thread.get_ident()
        return PathFinder.find_spec(name, STANDARD) if is_ours else None


def standard(name: str) -> "Any":
    """Import a module of the standard library. Raises ImportError if another has its name."""
    if name not in sys.modules:
        finder: Any = StandardFinder()
        sys.meta_path.insert(0, finder)
        try:
            __import__(name)
        finally:
            sys.meta_path.remove(finder)
    file = executed_file(name, sys.modules[name])
    if file and not file.startswith(STANDARD):
        raise ImportError(f"{name} is not the standard library's but {file}")
    return sys.modules[name]


def read(path: str, how: int = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)) -> bytes:
    """Return what is in the file, nothing if it can't be read; a pipe never blocks."""
    try:
        file = os.open(path, how)
        try:
            return os.read(file, os.fstat(file).st_size)  # a pipe or a device has no size
        finally:
            os.close(file)
    except (OSError, ValueError):
        return b""


def text_of(path: str) -> str:
    return read(path).decode("utf-8", "replace").replace("\r", "")


# ---- libraries -> statsd lines -> datagrams -> socket ---------------------------------

DATAGRAM = 1232  # bytes; the smallest IPv6 path, 1280, less the headers of IPv6 and UDP
PATIENCE = 1.0  # seconds that a name server, or another thread, may hold up a report
NAME_SERVER_PORT = 53

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
SETTINGS: "dict[str, tuple[str, str, Callable[[str], bool], str]]" = {
    # The default, letters that can't spoil a line, what else has to hold, and it in words.
    "PYTHON_POPCONTEST_STATSD_HOST": ("", LETTERS + ".:%-_",
        lambda text: not text or text.count(":") != 1  # no label is empty, or longer (RFC 1035)
        and all(0 < len(label) < 64 for label in text.removesuffix(".").split(".")),
        "a name or an address, without a port: statsd.example, 10.0.0.3 or ::1"),
    "PYTHON_POPCONTEST_STATSD_PORT": ("9125", "0123456789", lambda text: 0 < int(text[:6]) < 65536,
        "a whole number from 1 to 65535, such as 9125"),
    "PYTHON_POPCONTEST_STATSD_PREFIX": ("python_popcon.library_used", LETTERS + "_-.",
        lambda text: all(text.split(".")) and len(text) <= 1000,
        "at most 1000 of A-Z a-z 0-9 _ - with dots between, such as python_popcon.library_used"),
    "PYTHON_POPCONTEST_STATSD_SAMPLE_RATE": ("1", "0123456789.",  # statsd reads no 1e-05
        lambda text: len(text) < 20 and text.count(".") < 2 and 0 < float("0" + text) <= 1,
        "a decimal number above 0 and not above 1, such as 0.1"),
}  # fmt: skip


def setting(name: str) -> str:
    """Return the value of one of SETTINGS in force. Raises ValueError, saying what is right."""
    default, letters, is_right, words = SETTINGS[name]
    text = os.environ.get(name) or default
    if text.strip(letters) or not is_right(text):
        raise ValueError(f"{name}={text!r}: must be {words}")
    return text


def opted_out() -> bool:
    """Tell whether DO_NOT_TRACK is set, and not 0 (consoledonottrack.com)."""
    return os.environ.get("DO_NOT_TRACK", "0") != "0"


def debug(message: str) -> None:
    """Say it on stderr, in one line, if PYTHON_POPCONTEST_DEBUG is set, and not 0."""
    if os.environ.get("PYTHON_POPCONTEST_DEBUG", "0") not in ("", "0"):
        try:
            print("popcon:", *message.split(), file=sys.stderr, flush=True)
        except Exception:  # closed, or a person's own: then nobody is listening
            pass


def statsd_line(library: str, prefix: str, rate: str = "1") -> bytes:
    """Return the counter's line in the statsd protocol, without a newline."""
    return f"{prefix}.{library}:1|c{'' if float(rate) == 1 else '|@' + rate}".encode("ascii")


def datagrams(lines: "Iterable[bytes]") -> "list[bytes]":
    """Join the lines, a newline between, to as few datagrams of at most DATAGRAM bytes."""
    packed: list[bytes] = []
    for line in lines:
        if packed and len(packed[-1]) + 1 + len(line) <= DATAGRAM:
            packed[-1] += b"\n" + line
        else:
            packed.append(line)
    return packed


def send(packets: "list[bytes]", host: str, port: int) -> None:
    """Send the datagrams, and take them off the list. Raises OSError if no address takes them."""
    socket = standard("_socket")  # beneath socket, of which gevent or PySocks may replace parts
    is_address = ":" in host or host.replace(".", "").isdigit()
    if not (is_address or host in text_of("/etc/hosts").split()):
        await_name_server(host)
    # As bytes, since of a str it looks for the idna codec in files that may be gone by now.
    found = socket.getaddrinfo(host.encode("ascii"), port, 0, socket.SOCK_DGRAM)
    # IPv4 first: servers that listen on one family alone listen on that, and UDP tells of nobody.
    failure = OSError("the name has no address")
    for family, _, _, _, address in sorted(found, key=lambda one: one[0] != socket.AF_INET):
        try:
            udp = socket.socket(family, socket.SOCK_DGRAM)
            try:
                udp.settimeout(PATIENCE)
                while packets:
                    udp.sendto(packets[0], address)
                    del packets[0]
                return
            finally:
                udp.close()
        except OSError as error:
            failure = OSError(str(error))  # TimeoutError is said of name servers alone
    raise failure


def await_name_server(host: str) -> None:
    """Raise TimeoutError if the name server is silent: a look-up would hang, uninterruptibly."""
    socket = standard("_socket")
    lines = [line.split() for line in text_of("/etc/resolv.conf").split("\n")]
    servers = [words[1] for words in lines if words[:1] == ["nameserver"] and words[1:]]
    domains = ["", *(word for words in lines if words[:1] == ["search"] for word in words[1:])]
    for server in servers[:1]:
        udp = socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            udp.settimeout(PATIENCE)
            udp.connect((server, NAME_SERVER_PORT))
            for domain in domains:  # for all that the look-up may ask for (RFC 1035)
                labels = [label[:63] for label in f"{host}.{domain}".encode().split(b".") if label]
                name = b"".join([bytes([len(label)]) + label for label in labels])
                udp.send(b"pc\1\0\0\1\0\0\0\0\0\0" + name + b"\0\0\1\0\1")
            while domains and not any(udp.recv(512)[6:8]):  # till one is found
                domains.pop()
        except TimeoutError:
            raise TimeoutError(f"{host}: the name server is silent for {PATIENCE:g} s") from None
        except OSError:
            pass  # refused at once, as the look-up will be
        finally:
            udp.close()


# ---- the reporter -------------------------------------------------------------------

class Reporter:
    """What one process has loaded, used and sent."""

    def __init__(self) -> None:
        self.lock = _thread.allocate_lock()
        self.sent = set[str]()  # libraries
        self.draw = int.from_bytes(os.urandom(6), "big") / 2**48
        self.silent_until = 0.0  # when a name server that kept silent may be asked again
        self.start_over()

    def start_over(self) -> None:
        """Make what is loaded now the baseline. What was sent stays sent."""
        self.newest = self.after_cell = newest_module()
        self.baseline: set[str] | None = None  # files; None: of the modules up to the newest
        self.seen = set[str]()  # files whose owners are known
        self.used = set[str]()  # libraries

    def leave_out_session(self) -> None:
        """Add what an IPython session has loaded at its start, as debugpy does, to the baseline."""
        modules, starts = [*sys.modules.items()], ("ipykernel", "IPython.terminal.ipapp")
        first = [at for at, (name, _) in enumerate(modules) if str(name).startswith(starts)][:1]
        if first and self.baseline is not None:
            self.baseline |= executed_files(dict(modules[first[0] :]))

    def update(self) -> None:
        """Find the owners of what was loaded since the last time."""
        modules, (number, name) = dict(sys.modules), self.newest
        if self.baseline is None:
            names = [*modules]
            end = names.index(name) + 1 if name in modules else number - 1
            self.baseline = executed_files({name: modules[name] for name in names[:end]})
        new = executed_files(modules) - self.baseline - self.seen
        if new:
            loaded = self.baseline | new
            owned = owners(loaded, new)
            used = {name for name, files in owned.items() if files.isdisjoint(self.baseline)}
            if ipython_shell() is not None:
                used -= shells_own(import_roots(loaded))
            self.used |= used
            self.seen |= new

    def report(self) -> "list[str]":
        """Send what was not sent yet; return it. Raises ValueError or OSError that say why not."""
        if self.baseline is None and newest_module() == self.newest:
            raise ValueError("nothing was loaded since the last report, or a fork")
        if opted_out():
            self.start_over()  # what was loaded under it is not sent later either
            raise ValueError("DO_NOT_TRACK is set")
        host, port, prefix, rate = map(setting, SETTINGS)
        if not host:
            raise ValueError("PYTHON_POPCONTEST_STATSD_HOST is not set")
        if self.draw >= float(rate):
            raise ValueError(f"this process is not in the sample of {rate}")
        self.update()
        lines = {statsd_line(name, prefix, rate): name for name in sorted(self.used - self.sent)}
        if not lines:
            raise ValueError("no library was used" + " since the last report" * bool(self.sent))
        monotonic = standard("time").monotonic
        if monotonic() < self.silent_until:
            raise OSError("the name server was silent a while ago")
        packets = datagrams(lines)
        try:
            send(packets, host, int(port))
        except TimeoutError:
            self.silent_until = monotonic() + 600
            raise
        finally:  # whatever became of the others, these were sent
            left = b"\n".join(packets).split(b"\n")
            for line in [line for line in lines if line not in left]:
                self.sent.add(lines[line])
                debug(f"sent {line.decode()} to {host}:{port}")
        return [*lines.values()]


def newest_module() -> "tuple[int, object]":
    """Return what changes when a module is loaded; no module is looked at, which costs pages."""
    return len(sys.modules), next(reversed(sys.modules), None)


_reporter = Reporter()
_reporter.baseline = set()  # until it is set up, all counts
_set_up = _thread.allocate_lock()  # taken once, by the thread that sets up


def setup_reporter() -> None:
    """Report at exit, and in IPython after each cell, what is used beyond what is loaded by now.

    A later call loses nothing. It leaves out what an IPython session that has come since has
    loaded at its start. Never raises, prints nothing, and takes less than a millisecond.
    """
    try:
        if _set_up.acquire(False):
            _reporter.baseline = executed_files(dict(sys.modules))
            # Called last in, first out, so that a debugger or a profiler sees no frame of it.
            atexit.register(_report_at_exit)
            atexit.register(sys.setprofile, None)
            atexit.register(sys.settrace, None)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=_begin_in_child)
            _report_at_worker_exit()
        shell = ipython_shell()
        if shell is not None and _report_after_cell not in shell.events.callbacks["post_execute"]:
            shell.events.register("post_execute", _report_after_cell)
            _reporter.leave_out_session()
    except Exception as error:
        debug(f"not set up: {error!r}")


def used_libraries() -> "set[str]":
    """Return the libraries used since setup_reporter(), sent or not; without it, all that are."""
    _reporter.update()
    return set(_reporter.used)


def report() -> "list[str]":
    """Send now what was not sent yet, and return the names that were sent; for a server, say.

    Never raises: PYTHON_POPCONTEST_DEBUG tells why not, and it is tried again the next time.
    """
    reporter = _reporter
    if not reporter.lock.acquire(timeout=PATIENCE):
        return []  # another thread is at it
    try:
        return reporter.report()
    except Exception as error:
        debug(f"nothing sent: {error if isinstance(error, (OSError, ValueError)) else repr(error)}")
        return []
    finally:
        reporter.lock.release()


def _report_at_exit() -> "Any":
    try:
        _reporter.silent_until = 0.0
        report()
    except BaseException:  # Ctrl-C, say: the process is ending already
        debug("stopped")


def _begin_in_child() -> None:
    """Begin anew after a fork: what the parent loaded is the parent's."""
    global _reporter
    _reporter = Reporter()
    _report_at_worker_exit()


def _report_at_worker_exit() -> None:
    """Report when a worker of multiprocessing, or a relative, has run its finalizers."""
    last: Any = {"exitpriority": -100}  # made after a fork: a worker drops those of its parent
    for util in filter(None, map(sys.modules.get, ("multiprocessing.util", "multiprocess.util"))):
        util.register_after_fork(util, lambda u: u.Finalize(None, _report_at_exit, **last))
    pool: Any = sys.modules.get("billiard.pool")
    if pool:  # its workers leave without finalizers
        leave = pool.Worker._do_exit
        pool.Worker._do_exit = lambda *arguments: _report_at_exit() or leave(*arguments)


def ipython_shell() -> "Any":
    """Return the IPython shell that this process runs, None if it runs none; imports nothing."""
    shell = getattr(sys.modules.get("IPython.core.interactiveshell"), "InteractiveShell", None)
    return shell.instance() if shell is not None and shell.initialized() else None


def _report_after_cell() -> None:
    """Report what a cell has loaded: a kernel that gets killed runs nothing at exit."""
    try:
        newest = newest_module()
        if newest != _reporter.after_cell:
            report()
            _reporter.after_cell = newest
    except BaseException:  # IPython would show it, Ctrl-C too
        debug("stopped")


# ---- the command line: selftest -----------------------------------------------------

def selftest(_: object = None) -> int:
    """Prove the way from an import to a datagram, print what is in force; return 1 for errors."""
    status = 0
    for check in (check_reports, check_settings):
        try:
            for state, what, text in check():
                print(f"{state:9}{what:11}{text}", flush=True)
                status |= state == "error"
        except Exception as error:  # there is no place for temporary files, say
            print(f"error    {check.__name__[6:]:11}not checked: {error}")
            status = 1
    return status


def trial(*arguments: str) -> "tuple[bytes, str]":
    """Run Python beside a throw-away library; return what it sends over loopback, and says."""
    from pathlib import Path
    from socket import AF_INET, SOCK_DGRAM, socket
    from subprocess import DEVNULL, run
    from tempfile import TemporaryDirectory

    with socket(AF_INET, SOCK_DGRAM) as receiver, TemporaryDirectory(prefix="popcon-") as folder:
        info = Path(folder, "popcon_selftest-1.dist-info")
        info.mkdir()
        (info / "METADATA").write_text("Name: popcon_selftest\n", "ascii")
        (info / "RECORD").write_text("popcon_selftest.py,,\n", "ascii")
        Path(folder, "popcon_selftest.py").touch()
        receiver.bind(("127.0.0.1", 0))
        settings = zip(SETTINGS, ["127.0.0.1", str(receiver.getsockname()[1]), "", ""])
        environ = {**os.environ, **dict(settings), "DO_NOT_TRACK": "0", "IPYTHONDIR": folder}
        options: Any = {"stdin": DEVNULL, "capture_output": True, "timeout": 60}
        ended = run([sys.executable, "-B", *arguments], env=environ, cwd=folder, **options)
        receiver.sendto(b"", receiver.getsockname())  # so that something comes in any case
        return receiver.recv(65536), ended.stderr.decode(errors="replace")


def check_reports() -> "Iterator[tuple[str, str, str]]":
    """Look for popcon.py, and let processes import a library: which of them report it?"""
    from glob import escape, glob
    from time import perf_counter

    yield "ok", "popcon", f"{__version__}, {__file__}"
    yield "ok", "Python", f"{sys.version.split()[0]}, {sys.prefix}"
    library, switches = places()
    is_there = os.path.exists(library)
    if not is_there:
        yield "warning", "import", f"{library} is not there; `install` puts it there"
    elif not standard("compileall").compile_file(library, quiet=2):
        yield "warning", "bytecode", f"can't be written: each start compiles {library} anew"
    else:
        yield "ok", "bytecode", f"is there for {library}"
    for path in {*switches, *glob(os.path.join(escape(os.path.dirname([*switches][0])), "*.py"))}:
        if b"popularity_contest" in read(path) or not is_there and not whose(path):
            yield "warning", "left over", f"{path} is without popcon.py, or of popularity-contest"
    files, start = {os.path.join(folder, "x.py") for folder in sys.path}, perf_counter()
    owners(executed_files(dict(sys.modules)) | files, files)
    yield "ok", "cost", f"{(perf_counter() - start) * 1e3:.1f} ms at exit, if a library was used"
    load = "import runpy, sys; runpy.run_path(sys.argv[1])['setup_reporter'](); "
    code = "import os, sys; sys.path.insert(0, os.getcwd()); import popcon_selftest"
    received, said = trial("-c", load + code, __file__)
    state = "ok" if received == b"python_popcon.library_used.popcon-selftest:1|c" else "error"
    yield state, "reporting", f"a process used a library, and sent {received!r}\n{said}".strip()
    is_on, others = trial("-c", code)[0], "not each reports; `install --all-processes` changes that"
    yield "ok", "processes", "every one reports" if is_on else others
    if PathFinder.find_spec("IPython"):
        is_on = trial("-m", "IPython", "--quick", "-c", code)[0]
        others = "sessions do not report; `install` changes that"
        yield "ok" if is_on else "warning", "IPython", "every session reports" if is_on else others


def check_settings() -> "Iterator[tuple[str, str, str]]":
    """Tell what is in force, what would be right instead, and what keeps counts away."""
    from socket import SOCK_DGRAM, getaddrinfo, socket

    values = {}
    for name in SETTINGS:
        what = name.rpartition("_")[2].lower()
        try:
            values[what] = value = setting(name)
            yield "ok" if value else "warning", what, value or f"{name} is not set: nothing is sent"
        except ValueError as error:
            yield "error", what, f"{error}; nothing is sent"
    rules = r"(python_popcon(\.namespace\.[^.]+)?\.library_used)?"
    if not standard("re").fullmatch(rules, values.get("prefix", "")):
        known = "python_popcon.library_used or python_popcon.namespace.NAME.library_used"
        yield "warning", "mapping", f"README's rules match {known}, with no dot in NAME"
    if opted_out():
        yield "warning", "opted out", "DO_NOT_TRACK is set: nothing is sent"
    for name in sorted(os.environ.keys() - {*SETTINGS, "PYTHON_POPCONTEST_DEBUG"}):
        if name.startswith("PYTHON_POPCONTEST"):
            yield "warning", "unknown", f"{name} is no setting of popcon"
    host, port = values.get("host"), values.get("port")
    if not host or not port:
        return
    try:
        send([], host, int(port))  # looks up the name, with patience
        found = getaddrinfo(host, port, type=SOCK_DGRAM)
        family, _, _, _, address = min(found, key=lambda one: one[0])  # IPv4 first, as send() does
        with socket(family, SOCK_DGRAM) as udp:
            udp.settimeout(0.5)
            udp.connect(address)  # only so is a refusal heard of
            udp.send(b"")
            udp.recv(1)
    except TimeoutError:  # as it should be: no answer
        yield "ok", "server", f"{host} did not refuse an empty datagram, nor count it"
    except OSError as error:
        yield "error", "server", f"an empty datagram to {host}, port {port}, failed: {error}"


# ---- run ----------------------------------------------------------------------------

def run(options: "Any") -> "NoReturn":
    """Run a program as cProfile does, but send nothing, and say at its end what would be sent."""
    import runpy

    missing = "a program is missing: SCRIPT, -m MODULE or -c CODE"
    what, *arguments = options.m or options.c or options.script or command_line().error(missing)
    sys.argv = ["-c" if options.c else what, *arguments]
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        folder = os.path.dirname(os.path.realpath(what))
        sys.path[0] = os.getcwd() if options.m else "" if options.c else folder
    del sys.meta_path[0]  # main()'s
    conclude_at_exit(options.explain)
    main = sys.modules["__main__"] = type(sys)("__main__")
    try:
        if options.m:
            runpy.run_module(what, None, "__main__", alter_sys=True)
        elif options.c:
            exec(compile(what, "<string>", "exec"), vars(main))
        else:
            main.__file__ = os.path.join(os.getcwd(), what)
            with open(what, "rb") as file:
                code = compile(file.read(), main.__file__, "exec")
            exec(code, vars(main))
    except (Exception, KeyboardInterrupt) as error:
        trace = error.__traceback__  # without the frames that python would not have had
        ours = run.__code__.co_filename, runpy.__file__, "<frozen runpy>"
        while trace and trace.tb_frame.f_code.co_filename in ours:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        sys.exit(1 if isinstance(error, Exception) else 130)
    sys.exit()


def conclude_at_exit(explain: bool) -> None:
    """Let this process say at its end what it would have sent; nothing sends it."""
    is_opted_out = opted_out()
    os.environ["DO_NOT_TRACK"] = "1"
    process, known, reporter = os.getpid(), set(sys.modules), Reporter()
    reporter.baseline = executed_files(dict(sys.modules)) | {__file__}

    def conclude() -> None:
        lines: list[str] = []
        try:
            new = {name: sys.modules[name] for name in sys.modules.keys() - known}
            reporter.update()
            lines += explanation(new, reporter.used) if explain else ()
            _, _, prefix, rate = map(setting, SETTINGS)
            if is_opted_out or not reporter.used:
                raise ValueError("DO_NOT_TRACK is set" if is_opted_out else "no library was used")
            lines += [statsd_line(name, prefix, rate).decode() for name in sorted(reporter.used)]
        except Exception as error:
            lines.append(f"popcon: nothing would be sent: {error}")
        if sys.stderr and os.getpid() == process:
            print(*lines, sep="\n", file=sys.stderr)

    atexit.register(conclude)  # before the program registers any: so it runs last


def explanation(new: "Mapping[Any, object]", used: "set[str]") -> "Iterator[str]":
    """Yield lines that say whose the new modules are, and why what is not counted is not."""
    files = executed_files(new)
    owned = owners(files, files)
    for name in sorted(used):
        yield f"{name}: {len(owned.get(name, ()))} modules"
    for name in sorted(owned.keys() - used):
        yield f"not counted: {name}: it was loaded before"
    for file in sorted(files.difference(*owned.values())):
        yield f"not counted: {file}: of no library, or of an editable install"
    rest = {str(name) for name, module in new.items() if not executed_files({name: module})}
    ours = {name for name in rest if name.partition(".")[0] in sys.stdlib_module_names}
    for name in sorted(rest - ours):
        yield f"not counted: {name}: not executed, without a file, or Python's own"
    yield f"not counted: {len(ours)} modules of the standard library"


# ---- install, uninstall -------------------------------------------------------------

# By these words each of the files is known to be popcon's, of whatever version.
MARK = "# popcon counts which installed libraries are used, and nothing about who uses them.\n"
MARKS = MARK, '"""popcon: which installed libraries do people really use'

# Only popcon.py in site-packages is meant, not a person's own beside a notebook. Nobody is to
# notice if it is gone or half copied, or if another Python reads this; no name is left behind.
STARTUP = """\
def _popcon():
    import importlib.util, os, site
    if os.path.dirname(importlib.util.find_spec("popcon").origin) in site.getsitepackages():
        __import__("popcon").setup_reporter()
try:
    _popcon()
except Exception:
    pass
del _popcon
"""

# Only a line of a .pth file that begins with import is run, and nothing but exec lets one line
# be silent where popcon.py can't be read, or is a person's own on PYTHONPATH. From Python 3.18
# on .start files (PEP 829) are read instead, which are not silent when popcon.py is gone.
PTH = 'import sys; exec("try: import popcon; popcon.setup_reporter()\\nexcept Exception: pass")\n'
START = "popcon:setup_reporter\n"


def places() -> "tuple[str, dict[str, str]]":
    """Return where popcon.py is or belongs, and which texts where switch it on, IPython first."""
    from site import getsitepackages
    from sysconfig import get_path

    spec = PathFinder.find_spec("popcon", getsitepackages())
    library = (spec and spec.origin) or os.path.join(get_path("purelib"), "popcon.py")
    start_up = os.path.join(sys.prefix, "etc", "ipython", "startup", "000-popcon.py")
    name, content = ("popcon.start", START) if sys.version_info >= (3, 18) else ("popcon.pth", PTH)
    every = os.path.join(get_path("purelib"), name)
    return library, {start_up: MARK + STARTUP, every: MARK + content}


def whose(path: str) -> str:
    """Return whose a file is, as words, "" if it is install()'s, of whatever version."""
    from sysconfig import get_path

    if not any(mark in text_of(path)[:200] for mark in MARKS):
        return "it is not popcon's"
    if owners({path}, {path}):
        return "it was installed by pip, or the like"
    folder, name = os.path.split(path)
    is_ours = name != "popcon.py" or os.path.samefile(folder, get_path("purelib"))  # lib64 is lib
    return "" if is_ours else "it is where install does not write"


def install(options: "Any") -> int:
    """Let each IPython session of this environment report, or each process; print each path."""
    library, switches = places()
    chosen = [*switches] if options.all_processes else [*switches][:1]
    files = {library: read(__file__), **{path: switches[path].encode() for path in chosen}}
    for path, content in files.items():
        if os.path.lexists(path) and read(path) != content and whose(path):
            raise SystemExit(f"popcon: {path} is in the way: {whose(path)}; nothing was changed")
    os.umask(0o022)  # who uses the environment is to read it
    for path, content in files.items():
        is_new = read(path) != content
        if is_new:  # it appears whole, or not at all
            unfinished = f"{path}.{os.getpid()}.unfinished"
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(unfinished, "wb") as file:
                file.write(content)
            os.replace(unfinished, path)
        said, is_ours = "wrote" if is_new else "found", path == library and not whose(path)
        print(said, path)
        if is_ours and standard("compileall").compile_file(path, force=is_new, quiet=2):
            print(said, standard("importlib.util").cache_from_source(path))
    who = "each process" if options.all_processes else "each IPython and Jupyter session"
    print(f"Next: nothing is sent until {[*SETTINGS][0]} is set; then {who}", end=" ")
    print("reports. `python -m popcon selftest` shows whether it works.")
    return 0


def uninstall(_: object = None) -> int:
    """Remove what install() wrote into this environment, and print it."""
    from glob import escape, glob

    library, switches = places()
    cache = os.path.join(os.path.dirname(library), "__pycache__")
    startup = os.path.dirname([*switches][0])
    found = {path: whose(path) for path in [*switches, library] if os.path.lexists(path)}
    doomed = [path for path, words in found.items() if not words]
    for path in [*switches, library]:
        doomed += glob(f"{escape(path)}.*.unfinished")  # of an install that was killed
    if not found.get(library):
        doomed += glob(os.path.join(escape(cache), "popcon.*.pyc*"))
    for path in doomed:
        os.remove(path)
        print(f"removed {path}")
    for path in found.keys() - {*doomed}:
        print(f"left {path}: {found[path]}")
    if not found and not doomed:
        print(f"nothing to do: nothing is installed in {sys.prefix}")
    folders = [cache, startup, os.path.dirname(startup)]
    if sys.prefix != sys.base_prefix:  # elsewhere, as in /usr/local, an empty etc is usual
        folders.append(os.path.join(sys.prefix, "etc"))
    for folder in folders:
        with standard("contextlib").suppress(OSError):  # it is not empty, or not there
            os.rmdir(folder)
    return 0


# ---- usage: what is used, and what can go -------------------------------------------

if TYPE_CHECKING:
    Series = dict[frozenset[tuple[str, str]], list[tuple[float, float]]]  # (time, value) of each
    Answer = tuple[dict[str, float], float, str]  # counts of libraries, since when, what is wrong
    Rows = dict[str, dict[str, Any]]  # of each library what --json tells
    Graph = dict[str, set[str]]  # of each library what it requires, or what requires it

UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "y": 31536000}
OUTAGE = 2 * UNITS["h"]  # may lie between two scrapes: some scrape hourly, for privacy
# What hosts the sessions, installs, or is in the baseline: that nobody imports it says nothing.
HOSTS = """conda ipykernel ipython jupyter jupyter-server jupyterhub jupyterlab mamba nbclassic
    notebook pip popcon popularity-contest setuptools uv voila wheel"""
# Reasons why processes do not report: then it is not known what else they import.
SILENT = "runs sessions, or installs", "serves Jupyter", "its commands do not report"
# exec*() makes a process another program, as `dotenv run` does; the rest ends it: no report.
ENDS = b"execv", b"execl", b"os._exit", b"os.abort", b"raise_signal", b"kill(os.getpid()"
# Others find such files by their path. Those in NAME.libs have names that nobody else knows.
SHARED = r"(?!.*\.(dy)?libs/).*/(lib(?!.*\.(cpython|abi3|pypy))[^/]*\.so[\d.]*|[^/]*\.(dll|dylib))$"
EXTRA = r"""\bextra\s*==\s*["']([\w.-]+)"""
STARTS = r"[^/]*(\.pth|\.start|customize\.py)"  # beside the modules


def usage(options: "Any") -> int:
    """Print how much is used, and what can go; return 1 if there is no answer, or not yet."""
    now, window, day = standard("time").time(), options.window, UNITS["d"]
    try:
        _, _, prefix, rate = map(setting, SETTINGS)
        metric = standard("re").sub(r"(^|\.)namespace\.[^.]+\.", ".", prefix, count=1).strip(".")
        options.metric = options.metric or metric.replace(".", "_").replace("-", "_")
        read_counts = prometheus_counts if options.prometheus else exporter_counts
        counts, since, doubt = read_counts(options, now - window, now)
        if not any(counts.values()):
            what = f"no count of {options.metric} rose in {window / day:g} days there"
            raise OSError(f"{what}: is that its name, and does anything report (see selftest)?")
        if doubt:
            note(doubt)
        elif now - since < 0.99 * window:
            reach = f"{10 * (now - since) // day / 10:g} of {window / day:g} days"
            doubt = f"No answer yet: the counts reach back {reach}"
            note(f"{doubt}; ask for a shorter --window if that is long enough")
        rows, rare = judged(counts, options, doubt)
    except (OSError, ValueError) as error:
        raise SystemExit(f"popcon: {readable(str(error), 300)}") from None
    gone = [name for name, row in rows.items() if row["status"] == "unused" or name in rare]
    if float(rate) < 1:
        note(f"a sample of {rate} of the processes reports: rare uses may be missed")
    if gone and not everyone_reports():
        note("only IPython and Jupyter report here by themselves: scripts are not known")
    lines = gone if options.unused else table(rows, rare, options, since, doubt)
    if options.json:
        lines = [standard("json").dumps([*rows.values()], indent=1)]
    print("".join(f"{line}\n" for line in lines), end="")
    return 1 if doubt else 0


def everyone_reports() -> bool:
    """Tell whether start-up has set popcon up: else only sessions of IPython report here."""
    started = sys.modules.get("popcon")
    return bool(getattr(started, "_set_up", _set_up).locked()) and ipython_shell() is None


def readable(text: str, width: int) -> str:
    """Return in one short line what a server or metadata say, without what steers a terminal."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text[:9999]).split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def note(text: str) -> None:
    if sys.stderr is not None:
        print(f"popcon: {text}", file=sys.stderr, flush=True)


def fetch(options: "Any", url: str, **form: object) -> str:
    """Return what an HTTP server answers to a GET, or a POST of a long form. Raises OSError."""
    request, re, limit = standard("urllib.request"), standard("re"), 1 << 28
    plain = request.HTTPErrorProcessor()  # follows no redirect: headers may hold a secret
    plain.http_response = plain.https_response = lambda _, answer: answer
    data = standard("urllib.parse").urlencode(form)
    where, body = (f"{url}?{data}", None) if len(data) < 2000 else (url, data.encode())
    given = [text_of(text[1:]) if text.startswith("@") else text for text in options.header]
    headers = [re.findall(r"(?m)^[ \t]*([\w-]+)[ \t]*:[ \t]*([ -~]*)$", text) for text in given]
    if not all(headers):
        raise ValueError("--header must be 'Name: value', or @FILE with such lines")
    try:
        question = request.Request(where.rstrip("?"), body, dict(sum(headers, [])))
        with request.build_opener(plain).open(question, timeout=120) as answer:
            text: str = answer.read(limit).decode("utf-8", "replace")
            if getattr(answer, "length", 1) or answer.read(1):  # of Content-Length
                raise OSError("its answer is cut off, or has no end")
        if answer.status == 200:
            return text
        why = f"answers {answer.status} {answer.reason} {answer.headers.get('Location', '')} "
        why += "".join(re.findall(r'"error": *"((?:[^"\\]|\\.)+)', text)[:1])  # as Prometheus tells
    except (OSError, ValueError, standard("http.client").HTTPException) as error:
        why = f"cannot be read: {getattr(error, 'reason', '') or error or type(error).__name__}"
    raise OSError(f"{url.partition('?')[0]} {why}")


def ask(options: "Any", what: str, **form: object) -> "Series":
    """Return the series that Prometheus' HTTP API tells, by labels without name. Raises OSError."""
    url, found = f"{options.prometheus.rstrip('/')}/api/v1/{what}", {}
    # VictoriaMetrics would keep back what it got in the last 30 seconds.
    text = fetch(options, url, nocache=1, latency_offset="1ms", **form)
    try:
        answer = standard("json").loads(text)
        data = answer["data"]
        for one in [{"metric": one} for one in data] if what == "series" else data["result"]:
            pairs = one.get("values", [one["value"]] if "value" in one else [])
            samples = [(float(time), float(value)) for time, value in pairs]
            # NaN is no value: it marks where a series ended.
            samples = [pair for pair in samples if abs(pair[0]) < 1e12 and abs(pair[1]) < 1e12]
            labels = {key: str(one["metric"][key]) for key in one["metric"] if key != "__name__"}
            if samples or what == "series":
                found[frozenset(labels.items())] = samples
        # PromQL's remarks are harmless. Thanos and Mimir say so what was out of reach.
        lost = [text for text in answer.get("warnings", ()) if not text.startswith("PromQL")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise OSError(f"{url} does not answer as Prometheus does, but {text[:60]!r}") from None
    if lost:
        raise OSError(f"{url} does not know all: {lost[0]}")
    return found


def over_time(options: "Any", function: str, where: str, begin: float, end: float) -> "Series":
    """Return a function of PromQL's over a range, both ends included; no function: all samples."""
    span = f"{round((end - begin) * 1000) + 1}ms"  # Prometheus 3 leaves out the begin
    return ask(options, "query", query=f"{function}({{{where}}}[{span}])", time=end)


def lives(samples: "list[tuple[float, float]]") -> "list[list[float]]":
    """Return when an exporter was scraped in each of its lives; takes times, and its starts."""
    found: list[list[float]] = []
    known = 0.0
    for time, began in samples:
        # Where clocks are set right meanwhile, the start moves by less than the life is long.
        length = found[-1][-1] - found[-1][0] if found else 0
        if not found or began != known and not known - 60 < began <= known + length - 2:
            found.append([])
            known = began
        found[-1].append(time)
    return found


def prometheus_counts(options: "Any", start: float, end: float) -> "Answer":
    """Return how counters rose in a time, since when that is known, and why none is unused."""
    # increase() estimates. But in one life of an exporter counters begin at 0 and only rise: the
    # last less the one before the time is exact. All of one scrape has the same timestamp.
    quoted, re, parts = standard("json").dumps, standard("re"), []
    if not re.fullmatch(r"""(?s)\{(?!.*\blibrary\b["'`]?\s*[=!]).*\}""", options.match):
        what = "'{namespace=\"prod\"}', and not about the library: all others would seem unused"
        raise ValueError(f"--match must be as in PromQL, {what}")
    counters = f"__name__={quoted(options.metric)},{options.match[1:-1].strip()}".rstrip(",")
    series = ask(options, "series", **{"match[]": f"{{{counters}}}", "start": start, "end": end})
    counts, last = standard("collections").defaultdict(float), "last_over_time"
    for target in {frozenset(p for p in one if p[0] in ("job", "instance")) for one in series}:
        place = [f"{key}={quoted(value)}" for key, value in sorted(target)]
        where = ",".join([*place, counters])
        process = ",".join([*place, '__name__="process_start_time_seconds"'])
        exporters = over_time(options, "", process, start - OUTAGE, end)
        for exporter, samples in exporters.items():
            # Two clusters may have the same targets: their scrapes differ in milliseconds.
            own = exporter.difference(*(exporters.keys() - {exporter}))
            for life in lives(samples):
                times = [time for time in life if time <= start][-1:]
                before = over_time(options, last, where, *times * 2) if times else {}
                times += [time for time in life if time > start]
                if times[-1] > start:
                    now = over_time(options, last, where, times[-1], times[-1])
                    parts.append((where, own, times, before, now))
        if not exporters:  # nobody knows of its restarts: too much is better than too little
            now = over_time(options, last, where, start, end)
            parts += [(where, target, [start, end], {}, now)] if now else []
    has_ended, since = False, end
    for _, _, _, before, now in parts:
        for labels, [(_, value)] in now.items():
            rise = value - before.get(labels, [(0, 0)])[0][1]
            counts[library_of(labels)] += rise if rise >= 0 else value
            has_ended |= rise < 0
    few = [one for one in series if counts[library_of(one)] <= options.at_most]
    names = sorted({re.escape(dict(labels).get("library", "")) for labels in few})
    for where, own, times, before, now in parts:
        for first in range(0, len(names), 200):
            some = f"{where},library=~{quoted('|'.join(names[first : first + 200]))}"
            found = over_time(options, "count_over_time", some, times[0], times[-1])
            has_ended |= any(own <= one for one in found.keys() - now.keys())
            # A few samples may get lost on the way to a storage elsewhere.
            has_ended |= any(found[one][0][1] < 0.99 * len(times) for one in found if one in before)
    for times in sorted([part[2] for part in parts], key=lambda times: -times[-1]):
        if times[-1] > since - max(OUTAGE, (end - start) / 100):
            since = min(since, max(start, times[0]))
    if since > start or not any(part[3] for part in parts):  # the exporter may be older than popcon
        step = max(1.0, (end - since) / 500)
        query = f"count({last}({{{counters}}}[{1000 * step:.0f}ms]))"
        known = ask(options, "query_range", query=query, start=since, end=end, step=step)
        since = min((samples[0][0] for samples in known.values()), default=end)
    doubt = "No answer: counters ended before their exporter; give no ttl in its mapping"
    return counts, since, doubt if has_ended else ""


def library_of(labels: "Iterable[tuple[str, str]]") -> str:
    return normalized(dict(labels).get("library", ""))


def exporter_counts(options: "Any", start: float, end: float) -> "Answer":
    """Return what statsd_exporter has counted, by its metrics' URL or a file with them."""
    re, source, counts = standard("re"), options.metrics, standard("collections").defaultdict(float)
    if options.match != "{}":
        raise ValueError("--match is for --prometheus; an exporter's metrics are taken as they are")
    if source.startswith(("http://", "https://")):
        text = fetch(options, source)
    else:
        text, days = text_of(source), (end - os.stat(source).st_mtime) / UNITS["d"]
        if days > 1:
            note(f"the file is {days:.0f} days old: what was used since then is not in it")
    starts = re.findall(r"(?m)^process_start_time_seconds(?:{.*})? +([-+.\de]+)", text)
    sample = rf'(?m)^{re.escape(options.metric)}{{(?:.*,)?library="([\w.-]+)".*?}} +([-+.\de]+)'
    for name, value in re.findall(sample, text):
        counts[normalized(name)] += float(value)
    if not starts or not text.endswith("\n"):  # as the format wants it
        raise OSError(f"the answer is no exporter's metrics, or cut off: {text[:60]!r}")
    return counts, min(end, max(0.0, *map(float, starts))), ""  # the youngest of several


def library_at(info: str, words: "set[str]") -> "tuple[dict[str, Any], list[str]]":
    """Return a library's row, with the reason why no use proves nothing, and its code's paths."""
    re, folder = standard("re"), os.path.dirname(info).replace(os.sep, "/")
    stem, _, version = os.path.basename(info).rpartition(".")[0].partition("-")
    name, is_editable = library_name(info), os.path.exists(f"{info}{os.sep}direct_url.json")
    groups = {*re.findall(r"(?m)^\s*\[\s*([^]\s]+)", text_of(f"{info}/entry_points.txt"))}
    files, here, high = {}, len(folder) + 1, folder.count("/") + 2
    for path in map(os.fsdecode, filter(None, listed_paths(read(f"{info}/RECORD")))):
        files[os.path.normpath(os.path.join(folder, path)).replace(os.sep, "/")] = path
    # Beside the modules (pip install --target) or above, not within a package.
    commands = {p for p in files if p.split("/")[-2] in ("bin", "Scripts") and p.count("/") <= high}
    shared = set(filter(re.compile(SHARED).match, files)) - commands
    suffixes = tuple(standard("importlib.machinery").all_suffixes())
    code = {path for path in files if path.endswith(suffixes)} - shared - commands
    # owners() finds those alone that are below, plainly.
    modules = [path for path in code if path == f"{folder}/{files[path]}" and "\\" not in path]
    texts = [*map(read, commands)]
    is_silent = bool(texts or groups)
    if everyone_reports() and (is_silent or any(p.endswith("/__main__.py") for p in modules)):
        is_silent = not all(b"python" in text.partition(b"\n")[0] for text in texts)
        # Programs end themselves at the top of their package; to read all takes seconds.
        texts += [read(p) for p in modules if p[here:].count("/") < 2 and p.endswith(".py")]
        is_silent |= any(end in text for text in texts for end in ENDS)
    reasons = {
        SILENT[0]: (name or normalized(stem)) in HOSTS.split(),
        "takes part in every start": any(re.fullmatch(STARTS, path[here:]) for path in files),
        SILENT[1]: any("/etc/jupyter/jupyter_" in path for path in files),
        "extends Jupyter": any(re.search("/(share|etc)/jupyter/", path) for path in files),
        "editable, never counted": is_editable and not name,
        "its metadata have no name": not name,
        "has no RECORD of its files": not files,
        "odd paths in its RECORD": len(modules) < len(code),
        "nothing to import": not modules,
        "a plug-in, others find it": groups - {"console_scripts", "gui_scripts"},
        SILENT[2]: is_silent,
        "holds shared libraries": shared,
        "named in Jupyter's settings": words & {re.split(r"\W", p[here:])[0] for p in modules},
    }
    return {
        "library": name or normalized(stem) or info,
        "version": readable(version.partition("-")[0], 40),
        "bytes": sum(map(os.path.getsize, filter(os.path.exists, files))) if files else None,
        "reason": next((reason for reason, holds in reasons.items() if holds), ""),
    }, [*modules, *commands]


def installed_libraries() -> "tuple[Rows, Graph]":
    """Return the rows of what is installed, and what each name requires, by all of its metadata."""
    re, words = standard("re"), set()  # what configuration loads may be in the baseline, or servers
    prefixes, glob = (sys.prefix, "/usr/local", "/usr", "/"), standard("glob")
    below = "etc/ipython", "etc/jupyter", "share/jupyter/kernels"
    for place in [f"{glob.escape(prefix)}/{one}/**" for prefix in prefixes for one in below]:
        for path in glob.glob(place, recursive=True):
            words.update(re.findall(r"\w+", re.sub(r"(?m)^\s*#.*", "", text_of(path))))
    installed: Rows = {}
    wants: Graph = {}
    owner: dict[str, str] = {}
    for root in dict.fromkeys(map(os.path.realpath, sys.path)):
        for info in sorted(metadata_in(root)):
            row, paths = library_at(info, words)
            name = row["library"]
            wants.setdefault(name, set()).update(requirements(info))
            is_here = row["bytes"] is not None or root.endswith(("-packages", ".egg"))
            if is_here and installed.setdefault(name, row) is row:
                for path in paths:  # who removes one that shares a file breaks the other
                    other = owner.setdefault(path, name)
                    wants[name].add(other)
                    wants[other].add(name)
    return installed, wants


def requirements(info: str) -> "list[str]":
    """Return what the metadata require, as PEP 508 writes it; of an egg-info by requires.txt."""
    text = text_of(f"{info}{os.sep}METADATA") or text_of(f"{info}{os.sep}PKG-INFO")
    header, marker = text.lstrip().partition("\n\n")[0], ""
    found: list[str] = standard("re").findall("(?im)^Requires-Dist:(.*)", header)
    for line in text_of(f"{info}{os.sep}requires.txt").split("\n"):
        if line.startswith("["):  # [extra:marker], for the lines that follow
            marker = "; extra == " + repr(line.strip("[]").partition(":")[0])
        elif line:
            found.append(line + marker)
    return found


def required(names: "set[str]", silent: "set[str]", wants: "Graph") -> "tuple[Graph, Graph]":
    """Return who may require each library, and who does: of the names, and what these require."""
    re = standard("re")
    found: tuple[Graph, Graph] = ({}, {})
    queue = [(name, "*" if name in silent else "") for name in names]
    known = set(queue)
    for name, extra in queue:  # which grows
        for text in wants.get(name, ()):
            what, _, marker = text.partition(";")
            # Extras are all that is read of a marker: the rest is taken to hold, to be safe.
            ways = [re.findall(EXTRA, way) for way in re.split(r"\bor\b", marker)]
            is_asked = not all(ways) or extra in map(normalized, sum(ways, []))
            match = re.match(r"\s*([\w.-]+)\s*(?:\[([\w.,\s-]*))?", what)
            other = normalized(match[1]) if match else ""
            if other and (is_asked or extra == "*" and other != name):
                if other != name:  # of the silent ones any extra may be in use
                    found[is_asked].setdefault(other, set()).add(name)
                pairs = {(other, normalized(one)) for one in ["", *(match[2] or "").split(",")]}
                queue += pairs - known
                known |= pairs
    return found


def judged(counts: "dict[str, float]", options: "Any", doubt: str) -> "tuple[Rows, set[str]]":
    """Return a row for each library, installed or counted, and who could go but for rare uses."""
    installed, wants = installed_libraries()
    reasons = {name: row["reason"] for name, row in installed.items()}
    loaded = executed_files(dict(sys.modules))
    for name in owners(loaded, loaded):
        reasons[name] = reasons.get(name) or "loaded at every start"
    silent = {name for name in reasons if reasons[name] in SILENT}
    for pattern in options.keep:
        shape = standard("re").sub("[-_.]+", "-", pattern).lower()
        names = standard("fnmatch").filter(installed, shape)
        reasons.update({name: reasons[name] or "to be kept" for name in names})
        if not names:
            note(f"nothing installed is called {readable(pattern, 60)!r}, which was to be kept")
    used = {name for name in counts if name and counts[name]}
    stays = {name for name in wants if name not in installed or reasons[name]}
    many = {name for name in used if counts[name] > options.at_most}
    optional, needed = required(stays | used, silent, wants)
    others = set().union(*required(stays | many, silent, wants))
    rows, rare = {}, set()
    for name in sorted(used | {*installed}):
        count, reason = counts.get(name, 0), reasons.get(name) or doubt.partition(":")[0]
        if name in installed and not reason and name not in many and name not in others:
            rare |= {name} & (used | {*needed})
        if name in optional and not reasons.get(name):
            reason = f"optional: {', '.join(sorted(optional[name]))}"
        status = "required" if name in needed else "unknown" if reason else "unused"
        if count:
            status = "used" if name in installed else "absent"
        number = max(1, round(count)) if count else 0
        rows[name] = {
            **installed.get(name, {"library": name, "version": None, "bytes": None}),
            "processes": None if 0 < number < options.at_least else number,
            "status": status,
            "required_by": sorted(needed.get(name, ())),
            "reason": reason if status == "unknown" else "",
        }
    return rows, rare


def table(rows: "Rows", rare: "set[str]", options: "Any", since: float,
          doubt: str) -> "Iterator[str]":  # fmt: skip
    """Yield the lines of the table, by use, and what nobody used by size."""

    def size(rows: "Iterable[dict[str, Any]]") -> str:
        sizes = [row["bytes"] for row in rows if row["bytes"] is not None]
        return f"{sum(sizes) / 1e6:,.1f} MB" if sizes else "?"
    width = max(60, standard("shutil").get_terminal_size((80, 24)).columns)
    wide = min(max(map(len, rows)), width * 3 // 8)
    order = sorted(rows.values(), key=lambda row: (-(row["processes"] or 0), -(row["bytes"] or 0)))
    most = order[0]["processes"] or 1
    titles = {"used": "Used", "rare": f"Rarely used, by at most {options.at_most} processes",
              "unused": "Can go", "required": "Needed by others", "unknown": "Cannot be judged",
              "absent": "Counted, but not installed here"}  # fmt: skip
    yield f"rank  {'library':{wide}}        size  processes"
    for status, title in titles.items():
        group = [r for r in order if status == ("rare" if r["library"] in rare else r["status"])]
        if group:
            yield f"\n{title} ({len(group)}, {size(group)})"
        for rank, row in enumerate(group, 1):
            text, count = row["reason"] or ", ".join(row["required_by"]), row["processes"]
            if count != 0:
                bar = "#" * round(min(40, width - wide - 31) * (count or 0) / most)
                text = f"{f'<{options.at_least}' if count is None else f'{count:,}':>9}  {bar}"
            line = f"{rank:>4}  {row['library'][:wide]:{wide}}  {size([row]):>10}  {text}".rstrip()
            yield line if len(line) <= width else f"{line[: width - 3]}..."
    here = [row for row in order if row["status"] != "absent"]
    gone = [row for row in order if row["status"] == "unused"]
    time, who = standard("time"), "Nobody" if everyone_reports() else "No session"
    yield f"\n{len(gone)} of {len(here)} libraries can go, {size(gone)} of {size(here)}."
    yield f"Counted since {time.strftime('%Y-%m-%d %H:%M UTC%z', time.localtime(since))}."
    if gone or doubt:
        yield doubt or f"{who} has imported them since then, and nothing that stays needs them."


# ---- the options --------------------------------------------------------------------

def seconds(duration: str) -> float:
    """Return the seconds of a duration as PromQL writes it. Raises ValueError."""
    parts = standard("re").findall(r"(\d+)(ms|[smhdwy])", duration)
    if not parts or "".join(map("".join, parts)) != duration:
        raise ValueError
    return float(sum(int(number) * UNITS[unit] for number, unit in parts))


def command_line() -> "Any":
    """Return the parser of the command line; what it parses has run, which takes it."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> "NoReturn":
            self.exit(2, f"popcon: {' '.join(message.split())}; -h tells more\n")

    parser = Parser(
        prog="python -m popcon",
        description="Tell which installed libraries people really use, and not who uses them.",
        epilog="Begin with `install`, and set PYTHON_POPCONTEST_STATSD_HOST to the name of your "
        "statsd server. Then `selftest` shows whether it works. COMMAND -h tells more of each.",
    )
    parser.add_argument("--version", action="version", version=f"popcon {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for call, text in {
        install: "let each IPython and Jupyter session of this environment report",
        selftest: "show whether reporting works here, and what is in force",
        run: "run a program, and say at its end what it would have sent",
        usage: "tell how much each library is used, and which can go (status 1: not known yet)",
        uninstall: "remove what install wrote",
    }.items():
        commands.add_parser(call.__name__, help=text, description=text).set_defaults(run=call)
    every = "let every Python process of it report"
    commands.choices["install"].add_argument("--all-processes", action="store_true", help=every)
    runner = commands.choices["run"]
    runner.usage = "python -m popcon run [--explain] (SCRIPT | -m MODULE | -c CODE) [ARGUMENTS ...]"
    runner.add_argument("--explain", action="store_true", help="say whose each module is")
    for name in ("-m", "-c", "script"):  # and all that follows is the program's
        runner.add_argument(name, nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    teller = commands.choices["usage"]
    add = teller.add_mutually_exclusive_group(required=True).add_argument
    add("--prometheus", default="", metavar="URL", help="such as http://prometheus:9090")
    add("--metrics", default="", metavar="FILE_OR_URL", help="what an exporter's /metrics says")
    add = teller.add_argument
    add("--window", type=seconds, default="90d", help="time up to now that counts (default: 90d)")
    add("--match", type=str.strip, default="{}", help="""as in '{namespace="prod"}': what counts""")
    add("--keep", nargs="+", action="extend", default=[], metavar="NAME", help="or glob: stays")
    add("--metric", default="", help="name of the counters, if README's rules do not make it")
    add("--header", action="append", default=[], help="'Name: value', or @FILE with such lines")
    add("--at-most", type=int, default=0, metavar="K", help="list what K use or fewer, too")
    add("--at-least", type=int, default=0, metavar="K", help="show counts below K as <K")
    add = teller.add_mutually_exclusive_group().add_argument
    add("--unused", action="store_true", help="print only the names that can go")
    add("--json", action="store_true", help="print all as JSON")
    return parser


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run the command line, and return the exit status; misuse exits with 2."""
    finder: Any = StandardFinder()  # so that no command runs a person's own json.py
    sys.meta_path.insert(0, finder)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for paths that it can't encode
    try:
        options = command_line().parse_args(arguments)
        status: int = options.run(options)
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        return 130  # as the shell says it
    except OSError as error:  # a disk is full, or who reads it is gone, as with `| head -1`
        if sys.stdout:  # else Python tries to write the rest at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1 if isinstance(error, BrokenPipeError) else f"popcon: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
