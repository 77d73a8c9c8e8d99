#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""popcon: which installed libraries do people really use, and which does nobody?

When a Python process ends, popcon works out which installed libraries were
imported in it, and adds one to a global counter for each, over the statsd
protocol. One UDP datagram like this is all that leaves the process:

    python_popcon.library_used.numpy:1|c
    python_popcon.library_used.pandas:1|c

It holds no user, process, time or file name, and nothing of a person's own code.

Switch it on with 'python popcon.py install', or at the top of a script with
'import popcon; popcon.setup_reporter()', and by naming the statsd server. Switch
it off by leaving the host empty, with DO_NOT_TRACK=1, or with
'python -m popcon uninstall'.

    PYTHON_POPCONTEST_STATSD_HOST         name or address; without it, nothing is sent
    PYTHON_POPCONTEST_STATSD_PORT         default 9125
    PYTHON_POPCONTEST_STATSD_PREFIX       default python_popcon.library_used
    PYTHON_POPCONTEST_STATSD_SAMPLE_RATE  share of processes that report; default 1
    PYTHON_POPCONTEST_SIGTERM             1: report when SIGTERM ends the process, too
    PYTHON_POPCONTEST_DEBUG               1: say on stderr what was sent, or why nothing
    DO_NOT_TRACK                          set, and not 0: nothing is ever sent

What runs in people's processes comes first, and follows the data: from sys.modules
to the files that were executed, to the libraries that own them, to datagrams. Then
comes the reporter, which decides when that happens. What stands below the line 'the
command line' runs only for those who type a command.
"""

# A shell that is told to run this file gets no further than the next line.
__all__ = ("report", "setup_reporter", "used_libraries")
__version__ = "3.0.0"

# A bare interpreter has loaded all of these, so importing them costs nothing.
import _signal  # type: ignore[import-not-found]
import _thread
import atexit
import os
import sys
import time

if sys.hexversion < 0x030A0000:
    if __name__ == "__main__":
        sys.exit("popcon needs Python 3.10 or later")
    raise ImportError("popcon needs Python 3.10 or later") from None

from _frozen_importlib import BuiltinImporter, ModuleSpec, module_from_spec
from _frozen_importlib_external import PathFinder, SourceFileLoader, SourcelessFileLoader

# Only type checkers read this: importing typing takes longer than all of popcon.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, NoReturn

    Paths = Iterable[str]  # relative to an entry of sys.path, as in RECORD
    Owned = Iterator[tuple[str, Paths]]  # a library, and paths that it owns


# ---- sys.modules -> the files that were executed ------------------------------------

ModuleType = type(sys)

STANDARD_LIBRARY = os.path.dirname(getattr(os, "__file__", ""))
STANDARD_FOLDERS = (
    STANDARD_LIBRARY,
    os.path.join(STANDARD_LIBRARY, "lib-dynload"),
    os.path.join(sys.base_prefix, "DLLs"),
)


def executed_files(modules: "Mapping[Any, object]") -> "set[str]":
    """Return the files of the modules that were executed.

    The standard library's are left out. So are lazy modules, which are executed only
    when somebody uses them. If a top-level module has no file, because a loader of
    somebody's own made it, its name stands for the file.
    """
    lazy_module = namespace_of(sys.modules.get("importlib.util")).get("_LazyModule", ())
    files = set()
    for name, module in modules.items():
        if type(name) is not str or name.partition(".")[0] in sys.stdlib_module_names:
            continue
        try:
            if issubclass(type(module), lazy_module):
                continue
            file = executed_file(name, module)
        except Exception as error:
            debug(f"cannot tell the file of the module {name}: {error!r}")
            continue
        if file and file.rpartition(os.sep)[0] not in STANDARD_FOLDERS:
            files.add(file)
    return files


def executed_file(name: str, module: object) -> "str | None":
    """Return the file of a module, None if it has none or was not executed.

    Raises UnicodeEncodeError for a path that no file can have.
    """
    if module is None:
        return None  # somebody has forbidden to import it
    namespace = namespace_of(module)
    spec = namespace.get("__spec__")
    file = namespace.get("__file__")
    if type(spec) is ModuleSpec:
        if not was_executed(spec, namespace):
            return None
        # Some modules change their __file__, as tlz does. Others have the spec of
        # another module.
        if spec.has_location and (file is None or spec.name is name):
            file = spec.origin
        if file is None and is_made_without_file(name, spec):
            return name
    elif name in ("__main__", "__mp_main__"):
        return None  # a script is a person's own; what "python -m" runs has a spec
    elif file is None and "." not in name and type(module) is not ModuleType:
        # The module has put another object in its own place, as sh does.
        found = PathFinder.find_spec(name)
        file = found and found.origin
    if type(file) is not str or os.sep not in file:
        return None  # "<string>", for instance
    os.fsencode(file)
    return file


def namespace_of(module: object) -> "dict[str, Any]":
    """Return the namespace of a module, an empty one for any other object.

    What is in sys.modules may be lazy, or an object of somebody's own. So this runs
    no code of it, which getattr(), isinstance() and vars() could do.
    """
    if not issubclass(type(module), ModuleType):
        return {}
    namespace: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return namespace or {}  # a module that was never initialized has None


def was_executed(spec: "ModuleSpec", namespace: "dict[str, Any]") -> bool:
    """Tell whether a module was executed, and not merely created.

    The *-nspkg.pth files of older namespace packages create modules from a source
    that nobody executes. exec() adds __builtins__ to a namespace, and import adds
    _initializing to a spec.
    """
    if type(spec.loader) not in (SourceFileLoader, SourcelessFileLoader):
        return True
    return "__builtins__" in namespace or hasattr(spec, "_initializing")


def is_made_without_file(name: str, spec: "ModuleSpec") -> bool:
    """Tell whether a loader of somebody's own made a top-level module.

    Python's own makes namespace packages without a file.
    """
    loader = type(spec.loader)
    return "." not in name and loader.__module__ != "_frozen_importlib_external"


# ---- files -> the libraries that own them -------------------------------------------

METADATA_SUFFIXES = (".dist-info", ".egg-info", "EGG-INFO")
READ_LIMIT = 64 << 20  # bytes of a file; no RECORD in use comes near it


def owners(new: "set[str]", earlier: "Iterable[str]" = ()) -> "dict[str, set[str]]":
    """Map each library that owns some new files to the files that it owns.

    new: files, as executed_files() returns them
    earlier: more files; they are listed for libraries that own a new one as well
    """
    found: dict[str, set[str]] = {}
    unowned = new.union(earlier)
    for entry in path_entries(new):
        # In order of trust and cost. Each is asked only for what is left over.
        for ask in (
            entry.ask_namesakes,
            entry.ask_lookalikes,
            entry.ask_all_others,
            entry.ask_package_managers,
            entry.ask_names,
        ):
            paths = paths_below(entry.path, unowned)
            wanted = {path for path in paths if paths[path] in new}
            if not wanted:
                break
            for library, owned in answers(ask, paths, wanted):
                files = {paths[path] for path in owned}
                found.setdefault(library, set()).update(files)
                unowned -= files
    names = {name for name in new if os.sep not in name}
    for library, owned in answers(ask_packages_distributions, names, names):
        found.setdefault(library, set()).update(owned)
    found.pop("", None)  # a library that is editable, or has no valid name
    return found


def answers(
    ask: "Callable[[Paths, Paths], Owned]", paths: "Paths", wanted: "Paths"
) -> "list[tuple[str, Paths]]":
    """Ask about the owners of paths, and return nothing if that fails."""
    try:
        return list(ask(paths, wanted))
    except Exception as error:
        debug(f"cannot tell who owns {list(wanted)[:3]} and others: {error!r}")
        return []


def path_entries(files: "Iterable[str]") -> "list[PathEntry]":
    """Return the folders with metadata that files were imported from, outer ones first.

    Outer ones come first since a library owns the libraries that it brings along in a
    folder of its own, even if it puts that folder on sys.path.
    """
    above: set[str] = set()
    for folder in files:
        while folder and folder not in above:
            above.add(folder)
            folder = folder.rpartition(os.sep)[0]
    entries = {}
    for path, finder in list(sys.path_importer_cache.items()):
        try:
            # The path in full, if it is relative on sys.path.
            path = getattr(finder, "path", path).rstrip(os.sep)
            if path in above:
                # Python's own finders have listed the folder already.
                entry = PathEntry(path, getattr(finder, "_path_cache", ()))
                if entry.unread:
                    entries[path] = entry
        except Exception as error:
            debug(f"cannot tell what is installed in {path}: {error!r}")
    return sorted(entries.values(), key=lambda entry: len(entry.path))


def paths_below(folder: str, files: "Iterable[str]") -> "dict[str, str]":
    """Map paths relative to the folder, as in RECORD, to the files that lie below it."""
    start = folder + os.sep
    paths = {}
    for file in files:
        if file.startswith(start):
            path = file[len(start) :].replace(os.sep, "/")
            paths[path] = file
            if path.endswith(".pyc"):  # RECORD may list the source that it came from
                paths[path[:-1]] = file
    return paths


class PathEntry:
    """A folder on sys.path, with the distributions in it.

    unread: distributions whose RECORD was not read
    without_record: distributions that turned out to have none
    """

    def __init__(self, path: str, names: "Iterable[str]") -> None:
        self.path = path
        self.unread: set[Distribution] = set()
        self.without_record: list[Distribution] = []
        for name in names:
            if name.endswith(METADATA_SUFFIXES):
                self.unread.add(Distribution(path, name))

    # The ways to ask for owners follow. Each takes the paths of all modules that have
    # no owner yet, and those of the new ones among them, which decide whom to ask. It
    # yields libraries, each with those of the paths that it owns.

    def ask_namesakes(self, paths: "Paths", wanted: "Paths") -> "Owned":
        """Read the RECORDs of distributions that have the name of a module.

        To read all RECORDs takes seconds on a network file system.
        """
        tops = {squeezed(top) for top in top_levels(wanted)}
        likely = {one for one in self.unread if one.short_name in tops}
        return self.ask_records(likely, paths, wanted)

    def ask_lookalikes(self, paths: "Paths", wanted: "Paths") -> "Owned":
        """Read the RECORDs of distributions whose name resembles that of a module.

        So python-dateutil resembles dateutil, scikit-learn resembles sklearn, and
        protobuf is a part of google/protobuf.
        """
        packages = set()
        for path in wanted:
            parts = path.partition(".")[0].split("/")
            packages.add(squeezed("/".join(parts[:2])))
        tops = {package.partition("/")[0] for package in packages}
        text = " ".join(packages)
        likely = set()
        for one in self.unread:
            name = one.short_name
            if name in text or any(has_letters(name, top) for top in tops):
                likely.add(one)
        return self.ask_records(likely, paths, wanted)

    def ask_all_others(self, paths: "Paths", wanted: "Paths") -> "Owned":
        """Read the RECORDs that have not been read so far."""
        return self.ask_records(self.unread, paths, wanted)

    def ask_records(
        self, distributions: "set[Distribution]", paths: "Paths", wanted: "Paths"
    ) -> "Owned":
        """Read RECORDs, and yield the libraries that list some of the paths (PEP 376)."""
        self.unread = self.unread - distributions
        tops = tuple(map(os.fsencode, top_levels(wanted)))
        for distribution in distributions:
            record = distribution.read("RECORD")
            if not record:
                self.without_record.append(distribution)
            # To look at each line of all RECORDs takes longer than to search them.
            may_list = len(tops) > 5 or b'"' in record or record.startswith(tops)
            if may_list or any(b"\n" + top in record for top in tops):
                listed = listed_paths(decoded(record)).intersection(paths)
                if listed:
                    yield distribution.name(), listed

    def ask_package_managers(self, paths: "Paths", wanted: "Paths") -> "Owned":
        """Read the lists of files that dpkg and conda keep of their packages.

        Debian leaves out most RECORDs, and conda some. There a library owns what is in
        the same package as its metadata.
        """
        below = self.path.removeprefix(sys.prefix + os.sep).replace(os.sep, "/")
        for lists, begin, start, end in (
            ("/var/lib/dpkg/info/", "python3-", f"\n{self.path}/", "\n"),
            (f"{sys.prefix}/conda-meta/", "", f'"{below}/', '"'),
        ):
            if self.without_record and os.path.isdir(lists):
                for name in os.listdir(lists):
                    if name.startswith(begin) and name.endswith((".list", ".json")):
                        package = text_of(lists + name)
                        yield from self.in_package(package, start, end, paths)

    def in_package(
        self, package: str, start: str, end: str, paths: "Paths"
    ) -> "Owned":
        """Yield the libraries in a package, with those of the paths that it lists.

        start, end: what stands in it before and behind a path below the folder
        """
        for distribution in self.without_record:
            if start + distribution.info in package:
                listed = [path for path in paths if start + path + end in package]
                if listed:
                    yield distribution.name(), listed

    def ask_names(self, paths: "Paths", wanted: "Paths") -> "Owned":
        """Compare the names of libraries without a RECORD with those of modules."""
        if not self.path.endswith(("-packages", ".egg")):
            return  # an .egg-info elsewhere describes the source tree of a person's own
        modules = {}
        for distribution in self.without_record:
            library = distribution.name()
            text = decoded(distribution.read("top_level.txt"))
            assumed = [library.partition("-")[0], library.replace("-", "_")]
            modules[library] = text.split() or assumed
        for path in paths:
            stem = path.partition(".")[0]
            top = stem.partition("/")[0]
            able = [library for library in modules if top in modules[library]]
            # Many may share a top-level package. Then google-auth owns google/auth.
            name = squeezed(stem.replace("/", ""))
            exact = [library for library in able if squeezed(library) in name]
            if exact:
                able = [max(exact, key=len)]
            for library in able:
                yield library, [path]


def top_levels(paths: "Iterable[str]") -> "set[str]":
    """Return the names of top-level modules and packages, such as six for six.py."""
    return {path.partition("/")[0].partition(".")[0] for path in paths}


def has_letters(name: str, module: str) -> bool:
    """Tell whether a name has all letters of a module's name, in the same order."""
    if module in name:
        return True
    if name[:1] != module[:1]:
        return False  # that would be far-fetched
    rest = iter(name)
    return all(letter in rest for letter in module)  # goes on behind the last letter


def listed_paths(record: str) -> "set[str]":
    """Return the paths that a RECORD lists: the first field of each line, as in CSV."""
    if '"' not in record:  # as pip writes it
        return {line.partition(",")[0] for line in record.split("\n")}
    paths = set()
    for line in record.split("\n"):
        if line.startswith('"'):
            paths.add(line[1:].partition('",')[0].replace('""', '"'))
        else:
            paths.add(line.partition(",")[0])
    return paths


def ask_packages_distributions(modules: "Paths", _: "Paths") -> "Owned":
    """Ask importlib.metadata about modules that have no file.

    That takes long, so it is the last resort. It is of use only if a finder of
    somebody's own knows distributions that do not lie in folders. Then importlib.metadata
    is loaded already. The finder of its backport importlib_metadata is none of those.
    """
    metadata = sys.modules.get("importlib.metadata")
    has_finder = False
    for finder in sys.meta_path:
        if hasattr(finder, "find_distributions") and finder is not PathFinder:
            has_finder |= type(finder).__name__ != "MetadataPathFinder"
    if modules and metadata and has_finder:
        libraries = metadata.packages_distributions()
        for module in modules:
            for name in libraries.get(module, ()):
                yield normalized(name), [module]


class Distribution:
    """An installed library, as its .dist-info (PEP 376) or .egg-info describes it."""

    def __init__(self, folder: str, info: str) -> None:
        self.folder = folder
        self.info = info
        self.short_name = squeezed(info.removesuffix(".egg-info").partition("-")[0])

    def read(self, *names: str) -> bytes:
        """Return the content of a metadata file, nothing if it cannot be read.

        Without a name, it is that of the .egg-info itself, which may be a file.
        """
        return read(os.sep.join([self.folder, self.info, *names]))

    def header(self) -> "list[str]":
        """Return the lines of the metadata above the description."""
        content = self.read("METADATA") or self.read("PKG-INFO") or self.read()
        header, _, _ = decoded(content).lstrip().partition("\n\n")
        return header.split("\n")

    def name(self) -> str:
        """Return the normalized name, "" if it is not valid, or editable (PEP 610)."""
        url = b"".join(self.read("direct_url.json").split())
        if b'"editable":true' in url:
            return ""
        for line in self.header():
            if line[:5].lower() == "name:":
                return normalized(line[5:])
        return ""

    def requirements(self) -> "list[str]":
        """Return the names of what it requires, but for its extras (PEP 508)."""
        names = []
        for line in self.header():
            field, _, name = line.partition(": ")
            if field == "Requires-Dist" and "extra" not in name.partition(";")[2]:
                for end in " [(<>=!~;":
                    name = name.partition(end)[0]
                names.append(normalized(name))
        return names


def normalized(name: str) -> str:
    """Return a name as PEP 503 normalizes it, "" if it is not valid, or endless."""
    name = name.strip()
    if not is_plain(name, "-_.") or len(name) > 200:
        return ""
    words = name.lower().replace("_", "-").replace(".", "-").split("-")
    return "-".join(filter(None, words))


def is_plain(text: str, others: str) -> bool:
    """Tell whether a text holds ASCII letters or digits, and of other characters these."""
    for character in others:
        text = text.replace(character, "")
    return text.isascii() and text.isalnum()


def squeezed(name: str) -> str:
    """Return a name without case and separators, which are spelled in many ways."""
    return name.lower().replace("-", "").replace("_", "").replace(".", "")


def read(path: str) -> bytes:
    """Return the content of a file up to READ_LIMIT, nothing if it cannot be read.

    It does not wait for a writer, as open() does if the file is a pipe. A pipe has no
    size, so nothing is read of it.
    """
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.open(path, flags)
        try:
            return os.read(file, min(os.fstat(file).st_size, READ_LIMIT))
        finally:
            os.close(file)
    except (OSError, ValueError):
        return b""


def decoded(content: bytes) -> str:
    """Return the text, decoded as Python decodes the names of files."""
    text = content.decode(sys.getfilesystemencoding(), "surrogateescape")
    return text.replace("\r", "")


def text_of(path: str) -> str:
    """Return the text in a file, nothing if it cannot be read."""
    return decoded(read(path))


# ---- libraries -> statsd lines -> datagrams -> socket -------------------------------

DATAGRAM = 1232  # bytes; the smallest IPv6 path, 1280, less the headers of IPv6 and UDP
PATIENCE = 1.0  # seconds that a name server, or another thread, may hold up a report
NAME_SERVER_PORT = 53

HOST = "PYTHON_POPCONTEST_STATSD_HOST"
PORT = "PYTHON_POPCONTEST_STATSD_PORT"
PREFIX = "PYTHON_POPCONTEST_STATSD_PREFIX"
SAMPLE_RATE = "PYTHON_POPCONTEST_STATSD_SAMPLE_RATE"
SIGTERM = "PYTHON_POPCONTEST_SIGTERM"
DEBUG = "PYTHON_POPCONTEST_DEBUG"


def is_host(text: str) -> bool:
    labels = text.removesuffix(".").split(".")
    has_port = text.count(":") == 1
    are_labels = all(labels) and max(map(len, labels)) < 64  # RFC 1035
    return is_plain(text, ".:%-_") and are_labels and not has_port


def is_port(text: str) -> bool:
    return is_number(text) and len(text) < 6 and 0 < int(text) < 65536


def is_prefix(text: str) -> bool:
    return is_plain(text, ".-_") and len(text) <= 1000 and all(text.split("."))


def is_sample_rate(text: str) -> bool:
    is_decimal = is_number(text.replace(".", "", 1)) and len(text) < 20
    return is_decimal and 0 < float(text) <= 1


def is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


class Setting:
    """The default of a setting, what tells whether a value is right, and that in words."""

    def __init__(
        self, default: str, is_right: "Callable[[str], bool]", words: str
    ) -> None:
        self.default = default
        self.is_right = is_right
        self.words = words


SETTINGS = {
    HOST: Setting(
        "",
        is_host,
        "a name or an address, without a port: statsd.example, 10.0.0.3 or ::1",
    ),
    PORT: Setting("9125", is_port, "a whole number from 1 to 65535, such as 9125"),
    PREFIX: Setting(
        "python_popcon.library_used",
        is_prefix,
        "at most 1000 of A-Z a-z 0-9 _ - with dots between, such as "
        "python_popcon.library_used",
    ),
    SAMPLE_RATE: Setting(
        "1",
        is_sample_rate,
        "a decimal number above 0 and not above 1, such as 0.1",
    ),
}


def setting(name: str) -> str:
    """Return the value in force of one of SETTINGS. Raises ValueError if it is wrong."""
    text = os.environ.get(name, "")
    if not text:
        return SETTINGS[name].default
    if not SETTINGS[name].is_right(text):
        raise ValueError(f"{name}={text!r}: must be {SETTINGS[name].words}")
    return text


def is_on(name: str) -> bool:
    """Tell whether a setting that is a switch is set, and not 0."""
    return os.environ.get(name, "0") not in ("", "0")


def opted_out() -> bool:
    """Tell whether DO_NOT_TRACK is set, and not 0 (consoledonottrack.com)."""
    return os.environ.get("DO_NOT_TRACK", "0") != "0"


def debug(message: str) -> None:
    """Write a message to stderr, in one line, if PYTHON_POPCONTEST_DEBUG is on.

    It goes straight to the descriptor. If that is closed or full, print() would leave
    text in a buffer, and Python would end with status 120 since it cannot write it.
    """
    if not is_on(DEBUG):
        return
    line = f"popcon: {' '.join(message.split())}\n"
    try:
        os.write(sys.stderr.fileno(), line.encode("utf-8", "backslashreplace"))
    except Exception:
        pass  # there is no stderr, or it is an object of somebody's own


def statsd_line(library: str, prefix: str, rate: str = "1") -> bytes:
    """Return the line that adds one to a library's counter, without a newline."""
    line = f"{prefix}.{library}:1|c"
    if float(rate) < 1:
        line += f"|@{rate}"
    return line.encode("ascii")


def datagrams(lines: "Iterable[bytes]") -> "list[bytes]":
    """Join lines, in their order, to few datagrams of at most DATAGRAM bytes."""
    packed: list[bytes] = []
    for line in lines:
        if packed and len(packed[-1]) + 1 + len(line) <= DATAGRAM:
            packed[-1] += b"\n" + line
        else:
            packed.append(line)
    return packed


def send(packets: "list[bytes]", host: str, port: int) -> None:
    """Send datagrams, and remove from the list what was sent.

    Raises OSError if no address of the host takes them, SilentNameServer rather than
    wait for a name server longer than PATIENCE.
    """
    socket = standard_socket()
    failure = OSError(f"{host} has no address")
    for family, kind, _, _, address in look_up(host, port):
        try:
            udp = socket.socket(family, kind)
            try:
                udp.settimeout(PATIENCE)
                while packets:
                    udp.sendto(packets[0], address)
                    del packets[0]
                return
            finally:
                udp.close()
        except OSError as error:
            failure = error
    raise failure


def look_up(host: str, port: int) -> "list[tuple[Any, ...]]":
    """Return what getaddrinfo() finds, IPv4 first. Raises OSError, SilentNameServer.

    A server that listens on one family alone listens on IPv4, and UDP does not tell.
    Some name servers never answer a question about IPv6, so that is asked last.
    """
    socket = standard_socket()
    # As bytes: for a str it would import the codec idna, whose file may be gone.
    place = (host.encode("ascii"), port)
    is_address = ":" in host or host.replace(".", "").isdigit()
    if is_address or host in text_of("/etc/hosts").split():
        return sorted(socket.getaddrinfo(*place, socket.AF_UNSPEC, socket.SOCK_DGRAM))
    await_name_server(host, TYPE_A)
    try:
        return list(socket.getaddrinfo(*place, socket.AF_INET, socket.SOCK_DGRAM))
    except OSError:
        await_name_server(host, TYPE_AAAA)
        return list(socket.getaddrinfo(*place, socket.AF_INET6, socket.SOCK_DGRAM))


def standard_socket() -> "Any":
    """Return the module _socket, but never a person's own file of that name.

    The module socket takes long to import, and gevent may have replaced parts of it.
    """
    if "_socket" not in sys.modules:
        # The standard library may lie in two places (PYTHONHOME), so look further.
        folders = STANDARD_FOLDERS + tuple(sys.path)
        spec: Any = BuiltinImporter.find_spec("_socket")
        spec = spec or PathFinder.find_spec("_socket", folders)
        sys.modules["_socket"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["_socket"])
    return sys.modules["_socket"]


class SilentNameServer(OSError):
    """The name server does not answer."""


# Types of records (RFC 1035, RFC 3596)
TYPE_A = b"\0\1"
TYPE_AAAA = b"\0\x1c"


def await_name_server(host: str, record_type: bytes) -> None:
    """Ask the name server what getaddrinfo() will ask, and wait for an answer.

    getaddrinfo() cannot be interrupted, and takes long if the name server is silent.
    In that case this raises SilentNameServer.
    """
    servers = []
    names = [host]
    for line in text_of("/etc/resolv.conf").split("\n"):
        keyword, _, values = line.strip().partition(" ")
        if keyword == "nameserver":
            servers.append(values.strip())
        elif keyword == "search":
            names += [f"{host}.{domain}" for domain in values.split()]
    socket = standard_socket()
    for server in servers[:1]:
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        udp = socket.socket(family, socket.SOCK_DGRAM)
        try:
            udp.settimeout(PATIENCE)
            udp.connect((server, NAME_SERVER_PORT))
            for name in names:
                udp.send(dns_query(name, record_type))
            for _ in names:
                number_of_records = udp.recv(512)[6:8]
                if any(number_of_records):
                    break  # getaddrinfo() will ask no further
        except TimeoutError:
            message = f"{host}: the name server is silent for {PATIENCE:g} s"
            raise SilentNameServer(message) from None
        except OSError:
            pass  # it refuses at once, and so getaddrinfo() will not wait either
        finally:
            udp.close()


def dns_query(name: str, record_type: bytes) -> bytes:
    """Return the message that asks for the records of a name (RFC 1035)."""
    message = b"pc"  # any number
    message += b"\1\0"  # a standard query, recursion desired
    message += b"\0\1\0\0\0\0\0\0"  # one question, and nothing else
    for label in name.encode().split(b"."):
        if label:
            message += bytes([len(label)]) + label
    return message + b"\0" + record_type + b"\0\1"  # the end of the name; class IN


# ---- the reporter -------------------------------------------------------------------

class Reporter:
    """What one process has loaded, used and sent, and when it reports.

    A library counts as used if files of it were executed, and none of them is in the
    baseline.
    """

    def __init__(self) -> None:
        self.is_set_up = False
        self.shell: object = None  # the IPython shell that it reports for
        self.baseline: set[str] | None
        self.begin()
        self.baseline = set()  # until it is set up, all that is loaded counts

    def begin(self) -> None:
        """Begin for a process in which nothing was used or sent yet."""
        self.lock = _thread.allocate_lock()  # held during a report
        self.sent: set[str] = set()  # libraries
        self.silent_until = 0.0  # when a name server that was silent may be asked again
        self.shell_libraries: set[str] = set()
        self.start_over()
        self.draw = int.from_bytes(os.urandom(6), "big") / 2**48  # from 0 to below 1

    def start_over(self) -> None:
        """Make what is loaded now the baseline. What was sent stays sent."""
        self.newest = newest_module()  # when sys.modules was looked at last
        # Files, or None while those loaded up to the newest module are not known: to
        # look at all modules in a forked child would copy many pages of memory.
        self.baseline = None
        self.seen: set[str] = set()  # files beyond the baseline, with known owners
        self.used: set[str] = set()  # libraries

    def set_up(self) -> None:
        """Take the baseline, and see to it that reports are made. Once, but for IPython.

        Of a new IPython session, what it has loaded by itself becomes baseline as well.
        """
        shell = ipython_shell()
        is_new_session = shell is not None and shell is not self.shell
        if not self.is_set_up:
            self.is_set_up = True
            self.baseline = executed_files(loaded_by_session(shell, ("",)))
            register_unseen(self.report_at_exit)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=self.begin_in_child)
            self.report_when_workers_end()
            # A handler of somebody's own stays. Only the main thread may set one.
            if is_on(SIGTERM) and _signal.getsignal(_signal.SIGTERM) == _signal.SIG_DFL:
                _signal.signal(_signal.SIGTERM, self.report_at_sigterm)
        elif is_new_session and self.baseline is not None:
            session = loaded_by_session(shell, ("ipykernel", "IPython.terminal.ipapp"))
            self.baseline |= executed_files(session)
        if is_new_session:
            self.shell = shell
            shell.events.register("post_execute", self.report_after_cell)

    def update(self) -> None:
        """Find out which libraries were used since the last time."""
        if self.baseline is None:
            self.baseline = executed_files(modules_up_to(self.newest))
        self.newest = newest_module()
        new = executed_files(dict(sys.modules)) - self.baseline - self.seen
        if not new:
            return
        for library, files in owners(new, self.baseline).items():
            if files.isdisjoint(self.baseline):
                self.used.add(library)
        if ipython_shell() is not None:
            if not self.shell_libraries:
                self.shell_libraries = shell_libraries(self.baseline | new)
            self.used -= self.shell_libraries
        self.seen |= new

    def report(self) -> "list[str]":
        """Send what was not sent yet, and return those libraries. Never raises."""
        if not self.lock.acquire(timeout=PATIENCE):
            return []  # another thread is at it
        try:
            return self.send_new()
        except (OSError, ValueError) as error:
            debug(f"nothing sent: {error}")
        except Exception as error:
            debug(f"nothing sent: {error!r}")
        finally:
            self.lock.release()
        return []

    def send_new(self) -> "list[str]":
        """Send the libraries that were not sent yet, and return them.

        Raises ValueError if there is nothing to send, OSError if it cannot be sent.
        """
        if self.baseline is None and newest_module() == self.newest:
            raise ValueError("nothing was loaded since the last report, or a fork")
        if opted_out():
            self.start_over()  # what was loaded meanwhile is not sent later either
            raise ValueError("DO_NOT_TRACK is set")
        host = setting(HOST)
        port = int(setting(PORT))
        prefix = setting(PREFIX)
        rate = setting(SAMPLE_RATE)
        if not host:
            raise ValueError(f"{HOST} is not set")
        if self.draw >= float(rate):
            raise ValueError(f"this process is not in the sample of {rate}")
        self.update()
        lines = {}
        for library in sorted(self.used - self.sent):
            lines[statsd_line(library, prefix, rate)] = library
        if not lines:
            raise ValueError("no library was used, or none since the last report")
        if time.monotonic() < self.silent_until:
            raise OSError("the name server was silent a while ago")
        self.send_lines(lines, host, port)
        return list(lines.values())

    def send_lines(self, lines: "Mapping[bytes, str]", host: str, port: int) -> None:
        """Send lines, and note which of their libraries were sent. Raises OSError."""
        packets = datagrams(lines)
        try:
            send(packets, host, port)
        except SilentNameServer:
            self.silent_until = time.monotonic() + 600  # seconds
            raise
        finally:
            unsent = b"\n".join(packets).split(b"\n")
            for line, library in lines.items():
                if line not in unsent:
                    self.sent.add(library)
                    debug(f"sent {line.decode()} to {host}:{port}")

    # What follows runs at moments that nobody has asked for, so nothing may escape.

    def report_at_exit(self) -> None:
        try:
            self.silent_until = 0.0
            self.report()
        except BaseException:  # Ctrl-C, for instance: the process is ending already
            debug("stopped")

    def report_after_cell(self) -> None:
        """Report what a cell has loaded: a kernel that is killed runs nothing at exit."""
        try:
            if newest_module() != self.newest:
                self.report()
        except BaseException:  # IPython would show it, Ctrl-C too
            debug("stopped")

    def begin_in_child(self) -> None:
        """Begin anew after a fork: what the parent has loaded is the parent's."""
        try:
            self.begin()
            self.report_when_workers_end()
        except Exception as error:
            debug(f"not set up in a child: {error!r}")

    def report_when_workers_end(self) -> None:
        """Let the workers of multiprocessing report: they run no atexit functions.

        A worker drops the finalizers of its parent, so its own is made after the fork.
        The low priority puts it behind those of the worker's libraries.
        """

        def report_at_end(util: "Any") -> None:
            util.Finalize(None, self.report_at_exit, exitpriority=-100)

        for name in ("multiprocessing.util", "multiprocess.util"):
            util: Any = sys.modules.get(name)
            if util is not None:
                util.register_after_fork(util, report_at_end)

    def report_at_sigterm(self, number: int, frame: object) -> None:
        """Report, and let the signal end the process all the same."""
        self.report_at_exit()
        _signal.signal(number, _signal.SIG_DFL)
        os.kill(os.getpid(), number)


def register_unseen(function: "Callable[[], None]") -> None:
    """Register a function to be called at exit, unseen by debuggers and coverage.

    A debugger would stop in it otherwise. coverage warns unless its trace function is
    given back. A function in Python would be seen before it could take a trace function
    away, so these are in C: extend() lets map() call each of its functions once, with
    values that are known only then. atexit calls last what was registered first.
    """
    traces: list[Any] = []
    events: list[int] = []
    ignored: list[object] = []
    monitoring = getattr(sys, "monitoring", None)  # what pdb may use from 3.14 on
    debugger = [0]  # its DEBUGGER_ID
    if monitoring is not None:
        atexit.register(ignored.extend, map(monitoring.set_events, debugger, events))
    atexit.register(ignored.extend, map(sys.settrace, traces))
    atexit.register(function)
    atexit.register(sys.settrace, None)
    atexit.register(traces.extend, map(sys.call_tracing, [sys.gettrace], [()]))
    if monitoring is not None:
        running = filter(monitoring.get_tool, debugger)
        atexit.register(ignored.extend, map(monitoring.set_events, running, [0]))
        running = filter(monitoring.get_tool, debugger)
        atexit.register(events.extend, map(monitoring.get_events, running))


def newest_module() -> "tuple[int, object]":
    """Return what tells when a module was loaded, without a look at any of them."""
    return len(sys.modules), next(reversed(sys.modules), None)


def modules_up_to(newest: "tuple[int, Any]") -> "dict[Any, object]":
    """Return the modules that were loaded when newest_module() returned this."""
    number, name = newest
    modules = dict(sys.modules)
    names = list(modules)  # in the order of their import
    if name in modules:
        number = names.index(name) + 1  # some before it may have been removed since
    else:
        number -= 1
    return {name: modules[name] for name in names[:number]}


def ipython_shell() -> "Any":
    """Return the IPython shell that this process runs, or None. Imports nothing."""
    module = sys.modules.get("IPython.core.interactiveshell")
    shell = namespace_of(module).get("InteractiveShell")
    if shell is None or not shell.initialized():
        return None
    return shell.instance()


def loaded_by_session(shell: "Any", start: "tuple[str, ...]") -> "dict[Any, object]":
    """Return the modules in memory, but for what a person's IPython extensions loaded.

    start: what the name of the first module that is returned begins with
    """
    chosen = loaded_by_extensions(shell)
    loaded: dict[Any, object] = {}
    for name, module in dict(sys.modules).items():
        has_begun = bool(loaded) or str(name).startswith(start)
        if has_begun and name not in chosen:
            loaded[name] = module
    return loaded


def loaded_by_extensions(shell: "Any") -> "set[Any]":
    """Return the names of a person's IPython extensions, and of what they have imported.

    IPython loads the extensions that its settings name before it runs start-up files.
    In sys.modules, what a module imports comes before it, so all belongs to an extension
    that comes between it and the last module of the shell's own.
    """
    manager = getattr(shell, "extension_manager", None)
    extensions = getattr(manager, "loaded", ())
    found: set[Any] = set()
    since_shell: list[Any] = []
    has_shell = False
    for name in list(sys.modules):
        since_shell.append(name)
        if str(name).startswith(("IPython.", "ipykernel")):
            has_shell = True
            since_shell.clear()
        elif has_shell and name in extensions:
            found.update(since_shell)
    return found


def shell_libraries(files: "Iterable[str]") -> "set[str]":
    """Return IPython, ipykernel and all that they require: nobody chose to load these.

    files: what was imported from the folders in which they are installed
    """
    distributions = {}
    for entry in path_entries(files):
        for distribution in entry.unread:
            distributions[distribution.short_name] = distribution
    required: set[str] = set()
    queue = ["ipython", "ipykernel"]
    while queue:
        library = queue.pop()
        found = distributions.get(squeezed(library))
        if found is not None and library not in required:
            required.add(library)
            queue += found.requirements()
    return required


# One process, one reporter: the module may be imported again, by Spyder and Streamlit
# for instance, or reloaded. Then the last copy's code goes on with the first one's state,
# so an attribute must keep its meaning from one version to the next.
_reporter: Reporter = vars(sys).setdefault("_popcon_reporter", Reporter())
_reporter.__class__ = Reporter


def setup_reporter() -> None:
    """Report what is used from now on: at exit, and in IPython after each cell.

    Libraries that are loaded already do not count. A later call loses nothing, and
    leaves out what an IPython session loaded at its start, if one has begun since.
    Never raises, and prints nothing.
    """
    try:
        _reporter.set_up()
    except Exception as error:
        debug(f"not set up completely: {error!r}")


def used_libraries() -> "set[str]":
    """Return the libraries used since setup_reporter(), or without it, all."""
    _reporter.update()
    return set(_reporter.used)


def report() -> "list[str]":
    """Send now what was not sent yet, and return the names that were sent.

    It is for a server that never exits, for instance. Never raises: the setting
    PYTHON_POPCONTEST_DEBUG tells why nothing was sent. That is tried again next time.
    """
    return _reporter.report()


# ---- the command line ---------------------------------------------------------------


def is_set_up() -> bool:
    """Tell whether setup_reporter() was called in this process, by whichever copy."""
    return _reporter.is_set_up


# ---- selftest -----------------------------------------------------------------------

if TYPE_CHECKING:
    import socket

    Command = Callable[[argparse.Namespace], int]
    Findings = Iterator[tuple[str, str, str]]  # how it is, of what, and in words
    Check = Callable[[argparse.Namespace], Findings]

SELFTEST = "popcon-selftest"  # a library that is made up; usage does not show it


def add_selftest_options(parser: "argparse.ArgumentParser") -> None:
    server = parser.add_mutually_exclusive_group()
    text = "Send one count, and wait for it there: three scrapes, or three minutes."
    server.add_argument("--prometheus", default="", metavar="URL", help=text)
    text = "Do the same with the file of collect, or an exporter's metrics."
    server.add_argument("--metrics", default="", metavar="FILE_OR_URL", help=text)
    text = "Send 'Name: value', or such lines in @FILE, to a guarded server."
    parser.add_argument("--header", action="append", default=[], help=text)
    parser.set_defaults(match="{}", metric="", window=Window("3h"))


def selftest(options: "argparse.Namespace") -> int:
    """Show whether reporting works here, and what is in force."""
    status = 0
    checks = (check_files, check_processes, check_settings, check_server, check_chain)
    for check in checks:
        for state, what, text in findings(check, options):
            print(f"{state:9}{what:11}{text}", flush=True)
            if state == "error":
                status = 1
    return status


def findings(check: "Check", options: "argparse.Namespace") -> "Findings":
    """Yield what a check finds. If it fails, that is an error."""
    try:
        yield from check(options)
    except Exception as error:
        yield "error", check.__name__.removeprefix("check_"), str(error)


def check_files(_: "argparse.Namespace") -> "Findings":
    """Look for popcon.py where start-up finds it, and for its bytecode."""
    from compileall import compile_file

    yield "ok", "popcon", f"{__version__}, {__file__}"
    yield "ok", "Python", f"{sys.version.split()[0]}, {sys.prefix}"
    library = Places().library
    if not os.path.exists(library):
        yield "warning", "import", f"{library} is not there; `install` puts it there"
    elif compile_file(library, quiet=2):
        yield "ok", "bytecode", f"is there for {library}"
    else:
        yield "warning", "bytecode", f"no: each start compiles {library} anew"


def check_processes(_: "argparse.Namespace") -> "Findings":
    """Let processes import a library: which of them report it?"""
    set_up = "import runpy, sys; runpy.run_path(sys.argv[1])['setup_reporter'](); "
    use = "import popcon_selftest"
    sent, said = trial("-c", set_up + use, __file__)
    text = f"a process used a library, and sent {sent!r}"
    if sent == b"python_popcon.library_used.popcon-selftest:1|c":
        yield "ok", "reporting", text
    else:
        yield "error", "reporting", f"{text}; it said:\n{said}".rstrip()
    if trial("-c", use)[0]:
        yield "ok", "processes", "each Python process reports"
    else:
        yield "ok", "processes", "no script reports without `install --all-processes`"
    if PathFinder.find_spec("IPython") is None:
        return
    if trial("-m", "IPython", "--quick", "-c", use)[0]:
        yield "ok", "IPython", "each session of IPython and Jupyter reports"
    else:
        yield "warning", "IPython", "no session reports; `install` changes that"


def trial(*arguments: str) -> "tuple[bytes, str]":
    """Run Python beside a throw-away library; return what it sends, and its stderr."""
    from pathlib import Path
    from socket import AF_INET, SOCK_DGRAM, socket
    from subprocess import DEVNULL, run
    from tempfile import TemporaryDirectory

    temporary = TemporaryDirectory(prefix="popcon-")
    with socket(AF_INET, SOCK_DGRAM) as server, temporary as folder:
        info = Path(folder, "popcon_selftest-1.dist-info")
        info.mkdir()
        Path(info, "METADATA").write_text(f"Name: {SELFTEST}\n", "ascii")
        Path(info, "RECORD").write_text("popcon_selftest.py,,\n", "ascii")
        Path(folder, "popcon_selftest.py").touch()
        server.bind(("127.0.0.1", 0))
        settings = {HOST: "127.0.0.1", PORT: str(server.getsockname()[1]), DEBUG: "1"}
        settings |= {PREFIX: "", SAMPLE_RATE: "", "DO_NOT_TRACK": "0"}
        ended = run(
            [sys.executable, "-B", *arguments],
            env=os.environ | settings | {"IPYTHONDIR": folder, "PYTHONSAFEPATH": ""},
            cwd=folder,
            stdin=DEVNULL,
            capture_output=True,
            timeout=60,
        )
        server.sendto(b"", server.getsockname())  # so that something comes in any case
        return server.recv(65536), ended.stderr.decode(errors="replace")


def check_settings(_: "argparse.Namespace") -> "Findings":
    """Tell what is in force, or what would be right instead. Warn of misspelt names."""
    import re

    for name in SETTINGS:
        what = name.rpartition("_")[2].lower()
        try:
            value = setting(name)
        except ValueError as error:
            yield "error", what, f"{error}; nothing is sent"
            continue
        if value:
            yield "ok", what, value
        else:
            yield "warning", what, f"{name} is not set: nothing is sent"
        if name == PREFIX and not re.match(COUNT_LINE, statsd_line(SELFTEST, value)):
            text = "README's rules match python_popcon.library_used and "
            text += "python_popcon.namespace.NAME.library_used, with no dot in NAME"
            yield "warning", "mapping", text
    known = [*SETTINGS, SIGTERM, DEBUG]
    for name in sorted(os.environ):
        if "POPCON" in name.upper() and name not in known:
            text = f"{name} is no setting: they are {', '.join(known)}"
            yield "warning", "unknown", text
    if opted_out():
        yield "warning", "opted out", "DO_NOT_TRACK is set: nothing is sent"


def check_server(options: "argparse.Namespace") -> "Findings":
    """Send an empty datagram, which counts nothing, unless check_chain() sends one."""
    if os.environ.get(HOST) and not (options.prometheus or options.metrics):
        text = f"{send_and_listen(b'')}, does not refuse datagrams; "
        text += "whether it counts them, --prometheus or --metrics shows"
        yield "ok", "server", text


def send_and_listen(data: bytes) -> str:
    """Send a datagram to the server that is set, and return where that is.

    Raises ValueError if a setting is wrong, OSError if the datagram is refused.
    """
    from socket import socket

    host = setting(HOST)
    port = int(setting(PORT))
    place = f"{host}, port {port}"
    if not host:
        raise ValueError(f"{HOST} is not set: nothing is sent")
    try:
        family, kind, _, _, address = look_up(host, port)[0]
        with socket(family, kind) as udp:
            udp.settimeout(0.5)  # seconds
            udp.connect(address)  # only so is a refusal heard of
            udp.send(data)
            udp.recv(1)
    except TimeoutError:
        pass  # as it should be: no answer
    except OSError as error:
        raise OSError(f"nobody listens at {place}: {error}") from None
    return place


def check_chain(options: "argparse.Namespace") -> "Findings":
    """Send one count by the settings in force, and wait for it at the other end."""
    server = options.prometheus or options.metrics
    if not server:
        return
    if opted_out():
        raise ValueError("DO_NOT_TRACK is set: nothing is sent")
    line = statsd_line(SELFTEST, setting(PREFIX), setting(SAMPLE_RATE))
    before = selftest_counters(options)
    place = send_and_listen(line)
    patience = patience_with(before)
    if sys.stderr is not None and sys.stderr.isatty():
        note(f"waiting for one count more at {server}, up to {patience:.0f} s")
    end = time.monotonic() + patience
    while True:
        now = selftest_counters(options)
        risen = []
        for name, samples in now.items():
            if name not in before or samples[-1][1] != before[name][-1][1]:
                risen.append(name)
        if risen or time.monotonic() > end:
            break
        time.sleep(1)
    arrive = f"do datagrams arrive at {place}?"
    if any(map(has_label, risen)):
        yield "ok", "chain", f"one count arrived at {server}"
    elif risen:
        text = f"one count arrived as {unmapped_name()}"
        yield "error", "chain", f"{text}: the mapping does not know the prefix"
    elif any(map(has_label, now)):
        text = f"{server} knows the counter, but it did not rise"
        yield "error", "chain", f"{text}: {arrive}"
    else:
        text = f"{server} knows no such counter: is the exporter scraped"
        yield "error", "chain", f"{text}, {arrive}"


def selftest_counters(options: "argparse.Namespace") -> "dict[str, Samples]":
    """Return the samples of the counters that count popcon-selftest. Raises OSError."""
    now = time.time()
    counters: dict[str, Samples] = {}
    if options.metrics:
        for line in metrics_text(options, now).split("\n"):
            name, _, value = line.rpartition(" ")
            if has_label(name) or name == unmapped_name():
                counters[name] = [(now, float(value))]
        return counters
    # The right counter is asked for last: a scrape may come between the questions.
    for where in (f'__name__="{unmapped_name()}"', f'library="{SELFTEST}"'):
        found = Prometheus(options, now).samples(f"{{{where}}}", now - 10800, now)
        for labels, samples in found.items():
            counters[str(sorted(labels))] = samples
    return counters


def has_label(counter: str) -> bool:
    """Tell whether a mapping made a label of the library: else it is in the name."""
    return SELFTEST in counter


def unmapped_name() -> str:
    """Return the name that statsd_exporter makes of a counter that no rule matches."""
    return f"{setting(PREFIX)}.{SELFTEST}".replace(".", "_").replace("-", "_")


def patience_with(counters: "dict[str, Samples]") -> float:
    """Return the seconds to wait: three scrape intervals, if they are known."""
    for counter, samples in counters.items():
        times = [when for when, _ in samples]
        gaps = [later - when for when, later in zip(times, times[1:])]
        if gaps and has_label(counter):
            return max(30, 3 * min(gaps))
    return 180


# ---- run ----------------------------------------------------------------------------


def add_run_options(parser: "argparse.ArgumentParser") -> None:
    from argparse import REMAINDER, SUPPRESS

    program = "(SCRIPT | -m MODULE | -c CODE) [ARGUMENTS ...]"
    parser.usage = f"python -m popcon run [--explain] {program}"
    text = "Say of each module whose it is, or why it does not count."
    parser.add_argument("--explain", action="store_true", help=text)
    for name in ("-m", "-c", "script"):  # and all that follows is the program's
        parser.add_argument(name, nargs=REMAINDER, help=SUPPRESS)


def run(options: "argparse.Namespace") -> "NoReturn":
    """Run a program, and say at its end what it would send. Nothing is sent."""
    import runpy

    program = options.m or options.c or options.script
    if not program:
        command_line().error("a program is missing: SCRIPT, -m MODULE or -c CODE")
    what = program[0]
    folder = os.getcwd()
    main_module = type(sys)("__main__")
    if options.script:
        main_module.__file__ = os.path.join(folder, what)
        folder = os.path.dirname(os.path.realpath(what))
        with open(what, "rb") as file:
            code = compiled(file.read(), main_module.__file__)
    elif options.c:
        program[0] = "-c"
        folder = ""
        code = compiled(what, "<string>")
    sys.argv = program
    del sys.path[: len(STANDARD_FOLDERS)]  # which main() has put there
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = folder
    sys.modules["__main__"] = main_module
    conclude_at_exit(options.explain)
    try:
        if options.m:
            runpy.run_module(what, None, "__main__", alter_sys=True)
        else:
            exec(code, vars(main_module))
    except Exception as error:
        trace: Any = error.__traceback__
        trace = trace.tb_next  # without the frame of this function
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        sys.exit(1)
    sys.exit()


def compiled(source: "str | bytes", file: str) -> "Any":
    """Compile a program. Raises OSError if it is not in Python."""
    if file.endswith(".ipynb"):
        raise OSError(f"{file}: run what `jupyter nbconvert --to script` makes of it")
    try:
        return compile(source, file, "exec")
    except (SyntaxError, ValueError) as error:
        raise OSError(f"{file} is no Python program: {error}") from None


class Rehearsal(Reporter):
    """A reporter that says what it would send."""

    def send_lines(self, lines: "Mapping[bytes, str]", host: str, port: int) -> None:
        for line in lines:
            print(line.decode(), file=sys.stderr)


def conclude_at_exit(explain: bool) -> None:
    """Let this process say at its end what it would have sent; nothing sends it."""
    opt_out = os.environ.get("DO_NOT_TRACK", "0")
    os.environ["DO_NOT_TRACK"] = "1"
    process = os.getpid()
    known = set(sys.modules)
    reporter = Rehearsal()
    reporter.baseline = executed_files(dict(sys.modules)) | {__file__}
    reporter.draw = 0.0  # so that it is in every sample

    def conclude() -> None:
        if sys.stderr is None or os.getpid() != process:
            return
        os.environ["DO_NOT_TRACK"] = opt_out
        os.environ[HOST] = os.environ.get(HOST) or "localhost"  # which gets nothing
        try:
            if explain:
                reporter.update()
                names = sys.modules.keys() - known
                new = {str(name): sys.modules[name] for name in names}
                print(*explanation(new, reporter.used), sep="\n", file=sys.stderr)
            reporter.send_new()
        except Exception as error:
            note(f"nothing would be sent: {error}")
        os.environ["DO_NOT_TRACK"] = "1"

    atexit.register(conclude)  # before the program registers any: so it runs last


def explanation(new: "Mapping[str, object]", used: "set[str]") -> "Iterator[str]":
    """Yield lines that say whose new modules are, and why some do not count."""
    files = executed_files(new)
    owned = owners(files, files)
    for library in sorted(owned):
        if library in used:
            yield f"{library}: {len(owned[library])} modules"
        else:
            yield f"not counted: {library}: it was loaded before"
    for file in sorted(files.difference(*owned.values())):
        yield f"not counted: {file}: of no library, or of an editable install"
    for name in sorted(new):
        is_standard = name.partition(".")[0] in sys.stdlib_module_names
        if not is_standard and not executed_files({name: new[name]}):
            yield f"not counted: {name}: not executed, without a file, or Python's own"


# ---- install, uninstall -------------------------------------------------------------

# By these words each of the files is known to be popcon's, of whatever version.
MARK = "# popcon counts which installed libraries are used, and nothing about who uses "
MARK += "them.\n"
MARKS = (MARK, '"""popcon: which installed libraries do people really use')

# What IPython runs at the start of each session. Only popcon.py in site-packages is
# meant, not a person's own beside a notebook. Nobody is to notice if it is gone or half
# copied, or if another Python reads this; no name is left behind.
SESSION = f"""\
{MARK}def _popcon():
    import importlib.util, os, site
    popcon = importlib.util.find_spec("popcon").origin
    if os.path.dirname(popcon) in site.getsitepackages():
        __import__("popcon").setup_reporter()
try:
    _popcon()
except Exception:
    pass
del _popcon
"""

# Only a line of a .pth file that begins with import is run, and nothing but exec lets
# one line be silent where popcon.py can't be read, or is a person's own on PYTHONPATH.
# From Python 3.18 on .start files (PEP 829) are read instead, which are not silent when
# popcon.py is gone.
PTH = 'import sys; exec("try: import popcon; popcon.setup_reporter()'
PTH += '\\nexcept Exception: pass")\n'


class Places:
    """The files that switch popcon on in this environment, and what is in them.

    library: popcon.py, where start-up finds it
    session: what IPython runs at the start of each session
    process: what Python reads at the start of each process
    """

    def __init__(self) -> None:
        from sysconfig import get_path

        site_packages = get_path("purelib")
        self.library = os.path.join(site_packages, "popcon.py")
        spec = PathFinder.find_spec("popcon", [site_packages])
        if spec is not None and spec.origin is not None:
            self.library = spec.origin  # a package of somebody's own would hide ours
        folder = os.path.join(sys.prefix, "etc", "ipython", "startup")
        self.session = os.path.join(folder, "000-popcon.py")
        self.process = os.path.join(site_packages, "popcon.pth")
        self.process_text = MARK + PTH
        if sys.version_info >= (3, 18):
            self.process = os.path.join(site_packages, "popcon.start")
            self.process_text = MARK + "popcon:setup_reporter\n"


def foreign(path: str) -> str:
    """Return why a file is not from install, "" if it is from any version of it."""
    start = text_of(path)[:200]
    if not any(mark in start for mark in MARKS):
        return "it is not popcon's"
    if owners({path}, {path}):
        return "it was installed by pip, so `pip uninstall popcon` removes it"
    return ""


def write_whole(path: str, pieces: "Iterable[bytes]") -> None:
    """Write a file that appears whole, or not at all. Raises OSError."""
    unfinished = f"{path}.{os.getpid()}.unfinished"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.lexists(unfinished):
            os.remove(unfinished)  # of one that was killed, or of somebody else
        with open(unfinished, "xb") as file:  # never through a link
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        reason = f"{path} cannot be written: {error.strerror}"
        if isinstance(error, PermissionError):
            reason = f"you may not write in {os.path.dirname(path)}"
        raise OSError(reason) from None


def install(options: "argparse.Namespace") -> int:
    """Let each IPython and Jupyter session of this environment report."""
    from compileall import compile_file

    places = Places()
    files = {places.library: read(__file__), places.session: SESSION.encode()}
    if options.all_processes:
        files[places.process] = places.process_text.encode()
    for path, content in files.items():
        if os.path.lexists(path) and read(path) != content:
            reason = foreign(path)
            if reason:
                raise OSError(f"{path} is in the way: {reason}; nothing was changed")
    os.umask(0o022)  # who uses the environment is to read it
    for path, content in files.items():
        said = "found"
        if read(path) != content:
            write_whole(path, [content])
            said = "wrote"
        print(said, path)
    if compile_file(places.library, quiet=2):
        print("compiled", places.library)
    who = "each session of IPython and Jupyter"
    if os.path.exists(places.process):
        who = "each process"
    print(f"Next: {who} reports where {HOST} is set.")
    print("`python -m popcon selftest` shows whether it works.")
    return 0


def uninstall(_: "argparse.Namespace") -> int:
    """Remove the files that install has written.

    `pip uninstall popcon` leaves them. Then any copy of popcon.py removes them, by
    `python popcon.py uninstall`.
    """
    from glob import escape, glob

    places = Places()
    ours = []
    for path in (places.session, places.process, places.library):
        ours += glob(f"{escape(path)}.*.unfinished")  # of an install that was killed
        if os.path.lexists(path):
            reason = foreign(path)
            if reason:
                print(f"left {path}: {reason}")
            else:
                ours.append(path)
    if places.library in ours:
        folder = os.path.dirname(escape(places.library))
        ours += glob(os.path.join(folder, "__pycache__", "popcon.*.pyc*"))
    for path in ours:
        os.remove(path)
        print("removed", path)
    if not ours:
        print("nothing to remove in", sys.prefix)
    return 0


# ---- collect ------------------------------------------------------------------------
#
# What statsd_exporter and Prometheus do, as far as one machine needs it: to add up the
# datagrams, and to keep the counts in a file that `usage --metrics` reads.

BUFFER = 4 << 20  # bytes; enough for a thousand processes that end at once
LONGEST_NAME = 200  # letters, of a library with its namespace
MOST_NAMES = 50_000
SAVE_AFTER = 9  # seconds between writes, if counts have changed
ALIVE_AFTER = 60  # seconds between writes, if none has
SHORT_GAP = 7200  # seconds without anybody who listens that do no harm

# A line that README's mapping counts, as statsd_exporter reads it.
COUNT_LINE = (
    rb"(?m)^python_popcon\.(?:namespace\.([A-Za-z0-9_-]+)\.)?library_used"
    rb"\.([a-z0-9]+(?:-[a-z0-9]+)*):([0-9]{1,9})\|c(?:\|@([0-9]{0,9}\.?[0-9]{1,18}))?$"
)
FILE_LINE = (
    rb"(process_start_time_seconds|popcon_collect_last_alive_time_seconds|"
    rb'python_popcon_library_used\{library="[a-z0-9-]+"'
    rb'(?:,namespace="[A-Za-z0-9_-]+")?\}) ([0-9]+(?:\.[0-9]+)?(?:e[+-][0-9]{2})?)\n'
)


def add_collect_options(parser: "argparse.ArgumentParser") -> None:
    text = "Keep the counts in this file, which `usage --metrics FILE` reads."
    parser.add_argument("file", metavar="FILE", help=text)
    text = "Receive datagrams there, by default at 127.0.0.1:9125, which only this "
    text += "machine reaches. With 0.0.0.0:9125 other machines reach it, too."
    options: Any = {"type": address, "default": ("127.0.0.1", 9125), "help": text}
    parser.add_argument("--listen", metavar="ADDRESS:PORT", **options)


def address(text: str) -> "tuple[str, int]":
    """Return the host and the port that a text names."""
    from argparse import ArgumentTypeError

    host, _, port = text.rpartition(":")
    if not host or not is_port(port):
        raise ArgumentTypeError("it must be ADDRESS:PORT, such as 0.0.0.0:9125")
    return host.strip("[]"), int(port)


def collect(options: "argparse.Namespace") -> int:
    """Receive counts, and keep them in a file that `usage --metrics` reads."""
    import signal

    counts = CountFile(os.path.realpath(options.file))
    lock(counts.path)
    counts.load()
    host, port = options.listen
    with listening(host, port) as udp:
        udp.settimeout(1)  # second
        signals = []

        def end(number: int, _: object) -> None:
            signals.append(number)
            udp.settimeout(0)  # what has arrived is still counted

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        counts.save()
        note(f"counting into {counts.path} what arrives at {host}:{port}")
        while True:
            try:
                counts.add(udp.recv(65536))
            except (TimeoutError, BlockingIOError):
                if signals:
                    break
            if counts.is_due():
                counts.save()
        counts.save()
    if counts.failure:
        raise OSError(f"{counts.path}: the last counts are lost")
    return 0


def lock(path: str) -> None:
    """Lock a file against other collects while this process lives. Raises OSError."""
    beside = os.open(f"{path}.lock", os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock

        flock(beside, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        raise OSError(f"another collect counts into {path}") from None
    except (ImportError, OSError):
        pass  # Windows has no such locks, and some network file systems


def listening(host: str, port: int) -> "socket.socket":
    """Return a socket that receives datagrams. Raises OSError."""
    import socket

    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        family, kind, _, _, where = found[0]
        udp = socket.socket(family, kind)
        udp.bind(where)
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror}") from None
    option = (socket.SOL_SOCKET, socket.SO_RCVBUF)
    try:
        udp.setsockopt(*option, BUFFER)
    except OSError:
        pass  # macOS and BSD refuse what Linux cuts down without a word
    if udp.getsockopt(*option) < BUFFER:
        note(f"bursts may get lost; as root: sysctl -w net.core.rmem_max={BUFFER}")
    return udp


class CountFile:
    """Counts, and the file that keeps them, in the format of Prometheus.

    numbers: how many processes used a library, by the name and labels of its counter
    since, alive: from when until when all were counted, in seconds since 1970
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.numbers: dict[bytes, float] = {}
        self.since = time.time()
        self.alive = self.since
        self.is_changed = False  # since it was written
        self.tried = 0.0  # when it was written last, or could not be
        self.failure = ""  # why it could not
        self.is_full = False

    def load(self) -> None:
        """Read the file, if there is one. Raises OSError if it is not from collect."""
        import re

        if not os.path.exists(self.path):
            return
        failure = OSError(f"{self.path} was not written by collect, or is damaged")
        with open(self.path, "rb") as file:
            while line := file.readline(1000):
                found = re.fullmatch(FILE_LINE, line)
                if found is not None:
                    self.numbers[found[1]] = float(found[2])
                else:
                    raise failure
        try:
            self.since = self.numbers.pop(b"process_start_time_seconds")
            self.alive = self.numbers.pop(b"popcon_collect_last_alive_time_seconds")
        except KeyError:
            raise failure from None

    def add(self, datagram: bytes) -> None:
        """Add what a datagram counts; what is no line of popcon's is left out."""
        import re

        for namespace, library, number, rate in re.findall(COUNT_LINE, datagram):
            if len(namespace) + len(library) > LONGEST_NAME:
                continue
            labels = b'library="' + library + b'"'
            if namespace:
                labels += b',namespace="' + namespace + b'"'
            name = b"python_popcon_library_used{" + labels + b"}"
            self.is_changed = True
            if name not in self.numbers and len(self.numbers) >= MOST_NAMES:
                self.since = time.time()  # what is not complete is no answer
                if not self.is_full:
                    note(f"{MOST_NAMES:,} names are enough: new ones are left out")
                self.is_full = True
                continue
            share = float(rate or 1) or 1  # statsd_exporter takes 0 for 1, too
            self.numbers[name] = self.numbers.get(name, 0) + int(number) / share

    def is_due(self) -> bool:
        """Tell whether the file is to be written."""
        wait = SAVE_AFTER if self.is_changed else ALIVE_AFTER
        return time.monotonic() > self.tried + wait

    def save(self) -> None:
        """Write the file; if that fails, say so, and try it again later."""
        now = time.time()
        gap = now - self.alive
        # Begin anew with since when, if nobody listened for long, or the clock was set.
        if gap > max(SHORT_GAP, (self.alive - self.since) / 100) or self.since > now:
            self.since = now
        self.alive = now
        failure = ""
        try:
            write_whole(self.path, self.lines())
        except OSError as error:
            failure = f"{error}; the counts stay in memory until it works"
        if failure != self.failure:
            note(failure or f"{self.path} is written again")
        self.failure = failure
        self.is_changed = bool(failure)
        self.tried = time.monotonic()

    def lines(self) -> "Iterator[bytes]":
        yield b"process_start_time_seconds %.3f\n" % self.since
        yield b"popcon_collect_last_alive_time_seconds %.3f\n" % self.alive
        for name in sorted(self.numbers):
            yield b"%s %.15g\n" % (name, self.numbers[name])


# ---- usage: what is used, and what can go -------------------------------------------
#
# First the counts, from Prometheus or from an exporter's own metrics; then the
# libraries that are installed; who requires what; the verdict on each; the table.

if TYPE_CHECKING:
    import argparse

    Labels = frozenset[tuple[str, str]]  # of a series, without its name
    Samples = list[tuple[float, float]]  # times in seconds since 1970, and values
    Graph = dict[str, set[str]]  # of each library those that require it

CAN_GO = {"unused", "rare"}
# What the workers of these import is not known: they are killed, or end by os._exit().
WORKERS = {"parsl", "pyspark", "ray", "rq"}


def usage(options: "argparse.Namespace") -> int:
    """Print how much the libraries are used, and which can go.

    Return 1 if there is no answer yet, and 2 if something failed.
    """
    import json

    try:
        counts = counted(options)
        libraries = judged(counts, options)
        say_limits(libraries, counts)
    except (OSError, ValueError) as error:
        note(readable(str(error), 300))
        return 2
    if options.json:
        print(json.dumps([library.as_json() for library in libraries], indent=1))
    elif options.unused:
        for library in libraries:
            if library.group in CAN_GO:
                print(library.name)
    else:
        for line in table(libraries, counts, options):
            print(line)
    if counts.doubt:
        return 1
    return 0


def say_limits(libraries: "list[Library]", counts: "Counts") -> None:
    """Say on stderr what one should know before one believes the answer."""
    if counts.doubt:
        note(counts.doubt)
    rate = setting(SAMPLE_RATE)
    if float(rate) < 1:
        note(f"a sample of {rate} of the processes reports: rare uses may be missed")
    groups = [library.group for library in libraries]
    if not everyone_reports() and not CAN_GO.isdisjoint(groups):
        note(
            "only IPython and Jupyter report here by themselves: scripts are not "
            "known, nor kernels of virtual environments upon this one"
        )
    workers = sorted(WORKERS.intersection(counts.processes))
    if workers:
        names = ", ".join(workers)
        note(
            f"what workers of {names} import is known only if they call popcon.report()"
        )
    absent = groups.count("absent")
    here = len(groups) - absent
    if absent > 5 and absent > 2 * (len(counts.processes) - absent):
        note(
            f"{some(here, 'library is', 'libraries are')} installed in {sys.prefix}, "
            f"and {absent} that were counted are not: is it the right environment?"
        )


def everyone_reports() -> bool:
    """Tell whether start-up sets popcon up: else only IPython and Jupyter report."""
    return is_set_up() and ipython_shell() is None


def readable(text: str, width: int) -> str:
    """Return in one short line what others say, without what steers a terminal."""
    shown = ""
    for character in text[:9999]:
        shown += character if character.isprintable() else " "
    shown = " ".join(shown.split())
    if len(shown) > width:
        shown = shown[: width - 3] + "..."
    return shown


def note(text: str) -> None:
    """Print a sentence on stderr."""
    if sys.stderr is not None:
        print(f"popcon: {text}", file=sys.stderr, flush=True)


# -- the counts

DAY = 86400  # seconds
UNITS = {
    "y": 365 * DAY,
    "w": 7 * DAY,
    "d": DAY,
    "h": 3600,
    "m": 60,
    "s": 1,
    "ms": 0.001,
}
ENDED = "No answer: counters ended before their exporter; give no ttl in its mapping"
# So far back the last scrape before the window is looked for, in seconds: some scrape
# hourly, for privacy.
LOOK_BACK = 7200
ANSWER_LIMIT = 256 << 20  # bytes


class Window:
    """A time up to now, as PromQL writes it: 90d, or 1h30m."""

    def __init__(self, text: str) -> None:
        import re
        from argparse import ArgumentTypeError

        self.text = text
        self.seconds = 0.0
        self.unit = 0.0  # seconds of the last unit that was given
        for number, unit in re.findall("([0-9]+)(ms|[smhdwy])", text):
            self.unit = UNITS[unit]
            self.seconds += int(number) * self.unit
        if not self.seconds or not re.fullmatch("([0-9]{1,9}(ms|[smhdwy]))+", text):
            raise ArgumentTypeError(
                f"{text!r} must be a number above 0 with a unit, such as 90d or 12h"
            )

    def in_its_unit(self, seconds: float) -> str:
        """Return another time, rounded down, in the same unit or a smaller one."""
        for unit, length in UNITS.items():
            if length <= self.unit and seconds >= length:
                return f"{int(seconds / length)}{unit}"
        return "0s"


class Counts:
    """How many processes used each library; only those that were used."""

    def __init__(self) -> None:
        self.processes: dict[str, float] = {}
        self.since = 0.0  # when counting began, in seconds since 1970
        self.doubt = ""  # why that is no answer

    def add(self, name: str, number: float) -> None:
        # selftest counts that one, to see whether counts arrive.
        if name and name != "popcon-selftest" and 0 < number < 1e12:
            self.processes[name] = self.processes.get(name, 0) + number


def counted(options: "argparse.Namespace") -> Counts:
    """Return the counts that are asked for. Raises OSError or ValueError: why not."""
    import time

    now = time.time()
    options.metric = options.metric or metric_name()
    if options.prometheus:
        counts = Prometheus(options, now).counts()
    else:
        counts = exporter_counts(options, now)
    window = options.window
    if not counts.processes:
        hint = "is that its name, and does anything report (see selftest)?"
        if options.match.strip("{} ,"):
            hint = f"does --match {options.match} fit?"
        raise OSError(f"no count of {options.metric} rose in {window.text}: {hint}")
    known = now - counts.since
    if known < 0.99 * window.seconds and not counts.doubt:
        shown = window.in_its_unit(known)
        counts.doubt = f"No answer yet: the counts reach back {shown} of {window.text}"
        if shown != "0s":
            counts.doubt += f"; try --window {shown}"
    return counts


def metric_name() -> str:
    """Return the name that README's mapping makes of the prefix. Raises ValueError."""
    import re

    prefix = re.sub(r"(^|\.)namespace\.[^.]+\.", ".", setting(PREFIX), count=1)
    return re.sub("[.-]", "_", prefix.strip("."))


def exporter_counts(options: "argparse.Namespace", now: float) -> Counts:
    """Return what statsd_exporter or collect has counted, at a URL or in a file."""
    import re

    if options.match.strip("{} ,"):
        raise ValueError("--match is for --prometheus; --metrics are taken as they are")
    text = metrics_text(options, now)
    counts = Counts()
    starts = []
    string = r'"(?:[^"\\\n]|\\.)*"'
    sample = rf"(?m)^(\w+)(?:{{((?:[^\"}}\n]|{string})*)}})? +([-+.\de]+)"
    for name, labels, value in re.findall(sample, text):
        library = re.search(r'(?:^|,)\s*library="([\w.-]+)"', labels)
        if name == "process_start_time_seconds":
            starts.append(float(value))
        elif name == options.metric and library:
            counts.add(normalized(library[1]), float(value))
    if not starts or not text.endswith("\n"):  # as the format wants it
        hint = ""
        if "://" in options.metrics and "/metrics" not in options.metrics:
            hint = "; is /metrics missing at its end?"
        begin = readable(text[:60], 60)
        raise OSError(f"that is no exporter's metrics, or cut off: {begin!r}{hint}")
    youngest = max(starts)  # of several exporters
    counts.since = min(now, max(0.0, youngest))
    return counts


def metrics_text(options: "argparse.Namespace", now: float) -> str:
    """Return the text at the URL or in the file of --metrics. Raises OSError."""
    source = options.metrics
    if source.startswith(("http://", "https://")):
        return fetch(source, {}, options)
    try:
        with open(source, encoding="utf-8", errors="replace", newline="\n") as file:
            text = file.read(ANSWER_LIMIT)
            days = (now - os.fstat(file.fileno()).st_mtime) / DAY
    except OSError as error:
        hint = "a URL begins with http://"
        raise OSError(f"--metrics {source}: {error.strerror}; {hint}") from None
    if days > 1:
        age = some(int(days), "day", "days")
        note(f"the file is {age} old: later uses are not in it")
    return text


class Life:
    """One life of an exporter, from a start to an end: its counters only rise, from 0.

    Several servers may scrape it, and write into one storage. Then their labels differ.
    """

    def __init__(self, target: "Labels") -> None:
        self.target = target
        self.exporters: list[Labels] = []  # its own labels, as each server tells them
        self.common = target  # those that all of them tell
        self.neighbours: list[Labels] = []  # the labels of all exporters at the target
        self.servers: set[str] = set()  # names of labels that tell who scraped it
        # Times: the last before the window, and all in it.
        self.scrapes: list[float] = []
        # The values of the counters at the first of these times, if that is before the
        # window, and at the last.
        self.before: dict[Labels, float] = {}
        self.after: dict[Labels, float] = {}

    def tell_apart(self, exporters: "Iterable[Labels]") -> None:
        """Find out by which labels it differs from other exporters at the target."""
        self.common = frozenset.intersection(*self.exporters)
        self.neighbours = list(exporters)
        for labels in self.exporters:
            self.servers.update(dict(labels - self.common))

    def is_nearest(self, counter: "Labels") -> bool:
        """Tell whether no other exporter has more of a counter's labels.

        With honor_labels a counter may have others than its exporter.
        """
        shared = len(counter & self.common)
        return all(len(counter & labels) <= shared for labels in self.neighbours)

    def counter(self, labels: "Labels") -> "Labels":
        """Return the labels of a counter without those that tell who scraped it."""
        return frozenset(pair for pair in labels if pair[0] not in self.servers)


class Prometheus:
    """A server that knows the counters, and the window in which they matter."""

    def __init__(self, options: "argparse.Namespace", now: float) -> None:
        seconds = options.window.seconds
        self.options = options
        self.counters = matchers(options)
        self.start: float = now - seconds
        self.end = now
        # Seconds without an exporter that matter little.
        self.outage: float = min(max(LOOK_BACK, seconds / 100), seconds / 10)

    def counts(self) -> Counts:
        """Return by how much the counters rose in the window."""
        # PromQL's increase() estimates. The last value in a life of an exporter, less
        # the one before the window, is exact. All of a scrape has the same timestamp.
        series = self.series()
        lives = []
        for target in {target_of(labels) for labels in series}:
            lives += self.lives_at(target)
        counts = Counts()
        for life in lives:
            for labels, value in life.after.items():
                rise = value - life.before.get(labels, 0)
                if rise < 0:
                    counts.doubt = ENDED
                    rise = value
                counts.add(library_of(labels), rise)
        idle = set()
        for labels in series:
            name = library_of(labels)
            if name and counts.processes.get(name, 0) <= self.options.at_most:
                idle.add(dict(labels)["library"])
        for life in lives:
            if idle and self.has_lost(life, idle):
                counts.doubt = ENDED
        counts.since = self.reach(lives)
        return counts

    def lives_at(self, target: "Labels") -> "list[Life]":
        """Return the lives of the exporters at an address, as far as they matter."""
        process = selector(target, '__name__="process_start_time_seconds"')
        exporters = self.samples(process, self.start - LOOK_BACK, self.end)
        if not exporters:
            return self.unknown_lives(target)
        # Two clusters may have the same addresses, but not the same start.
        lives: dict[float, Life] = {}
        for labels, samples in exporters.items():
            for start, times in parted_by_start(samples):
                life = lives.setdefault(start, Life(target))
                life.exporters.append(labels)
                life.scrapes += times
        for life in lives.values():
            life.tell_apart(exporters)
            times = sorted(life.scrapes)
            early = [time for time in times if time <= self.start]
            life.scrapes = early[-1:] + times[len(early) :]
            life.after = self.values(life, life.scrapes[-1])
            if early:
                life.before = self.values(life, life.scrapes[0])
        return list(lives.values())

    def unknown_lives(self, target: "Labels") -> "list[Life]":
        """Return one life for all: where no restarts are known, count too much."""
        life = Life(target)
        where = selector(target, self.counters)
        numbers = self.over_time("count", where, self.start - LOOK_BACK, self.end)
        if not numbers:
            return []
        longest = max(numbers, key=numbers.__getitem__)
        its_own = selector(longest, self.counters)
        samples = self.samples(its_own, self.start - LOOK_BACK, self.end)
        life.scrapes = [time for time, _ in samples[longest]]
        life.after = self.over_time("last", where, self.start, self.end)
        return [life]

    def values(self, life: Life, time: float) -> "dict[Labels, float]":
        """Return the values of the counters in the scrape at this time."""
        where = selector(life.target, self.counters)
        found: dict[Labels, float] = {}
        for labels, value in self.over_time("last", where, time, time).items():
            counter = life.counter(labels)
            found[counter] = found.get(counter, 0) + value
        return found

    def has_lost(self, life: Life, libraries: "set[str]") -> bool:
        """Tell whether a counter of these libraries ended before its exporter did."""
        import re

        # To count samples makes the server read all of them. So only where it matters.
        pattern = quoted("|".join(map(re.escape, sorted(libraries))))
        where = selector(life.target, f"{self.counters},library=~{pattern}")
        begin, end = life.scrapes[0], life.scrapes[-1]
        numbers: dict[Labels, float] = {}
        for labels, number in self.over_time("count", where, begin, end).items():
            counter = life.counter(labels)
            numbers[counter] = numbers.get(counter, 0) + number
        for counter, number in numbers.items():
            if counter not in life.after:
                if life.is_nearest(counter):
                    return True
            # A few samples may get lost on the way to a storage elsewhere.
            elif counter in life.before and number < 0.99 * len(life.scrapes):
                return True
        return False

    def reach(self, lives: "list[Life]") -> float:
        """Return since when counters are known, but for short outages."""
        since: float = self.end
        for life in sorted(lives, key=lambda life: -life.scrapes[-1]):
            if life.scrapes[-1] > since - self.outage:
                since = min(since, life.scrapes[0])
        # An exporter may be older than popcon.
        begin: float = self.end
        for life in sorted(lives, key=lambda life: life.scrapes[0]):
            if since <= life.scrapes[0] < begin:
                begin = min(begin, self.first_count(life))
        return max(begin, self.start, 0.0)

    def first_count(self, life: Life) -> float:
        """Return when an exporter first had a counter. Within a life they all stay."""
        if life.before:
            return life.scrapes[0]
        if not life.after:
            return self.end
        first, last = 0, len(life.scrapes) - 1
        while first < last:
            middle = (first + last) // 2
            if self.values(life, life.scrapes[middle]):
                last = middle
            else:
                first = middle + 1
        return life.scrapes[first]

    def series(self) -> "list[Labels]":
        """Return the labels of all counters that there may have been in the window."""
        where = selector(frozenset(), self.counters)
        form = {"match[]": where, "start": self.start, "end": self.end}
        return list(self.ask("series", form))

    def over_time(
        self, what: str, where: str, begin: float, end: float
    ) -> "dict[Labels, float]":
        """Return the last values in a time, or the count of values."""
        found = self.samples(where, begin, end, f"{what}_over_time")
        return {labels: samples[0][1] for labels, samples in found.items()}

    def samples(
        self, where: str, begin: float, end: float, function: str = ""
    ) -> "dict[Labels, Samples]":
        """Return the samples in a time, or what PromQL's function makes of them."""
        # Prometheus 3 leaves out the begin.
        milliseconds = round((end - begin) * 1000) + 1
        query = f"{function}({where}[{milliseconds}ms])"
        found = self.ask("query", {"query": query, "time": end})
        return {labels: samples for labels, samples in found.items() if samples}

    def ask(self, path: str, form: "dict[str, Any]") -> "dict[Labels, Samples]":
        """Return what Prometheus' HTTP API answers, by labels. Raises OSError."""
        import json

        url = f"{self.options.prometheus.rstrip('/')}/api/v1/{path}"
        # VictoriaMetrics would keep back what it got in the last 30 seconds.
        form.update(nocache=1, latency_offset="1ms")
        text = fetch(url, form, self.options)
        try:
            answer = json.loads(text)
            found = dict(map(labels_and_samples, series_in(answer["data"])))
            # PromQL's remarks are harmless. Thanos and Mimir say so what is lost.
            warnings = answer.get("warnings", ())
            lost = [warning for warning in warnings if "PromQL" not in warning]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            shown = readable(text[:60], 60)
            odd = f"does not answer as Prometheus does, but {shown!r}; {IS_EXPORTER}"
            raise OSError(f"{url} {odd}") from None
        if lost:
            raise OSError(f"{url} does not know all: {lost[0]}")
        return found


IS_EXPORTER = "an exporter is to be given as --metrics URL"


def series_in(data: "Any") -> "list[dict[str, Any]]":
    """Return the series in an answer; where it is a list, it is one of labels."""
    if isinstance(data, list):
        return [{"metric": labels} for labels in data]
    found: list[dict[str, Any]] = data["result"]
    return found


def labels_and_samples(one: "dict[str, Any]") -> "tuple[Labels, Samples]":
    """Return the labels of a series, without its name, and its samples."""
    samples = []
    pairs = list(one.get("values", ()))
    if "value" in one:
        pairs.append(one["value"])
    for when, text in pairs:
        # NaN is no value: it marks where a series ended.
        if abs(when) < 1e12 and abs(float(text)) < 1e12:
            samples.append((float(when), float(text)))
    metric = {name: str(value) for name, value in one["metric"].items()}
    metric.pop("__name__", None)
    return frozenset(metric.items()), samples


def matchers(options: "argparse.Namespace") -> str:
    """Return what PromQL's braces hold to choose the counters. Raises ValueError."""
    import re

    if not re.fullmatch(r"(?s)\{.*\}", options.match):
        raise ValueError("""--match must be as in PromQL: '{namespace="prod"}'""")
    if re.search(r"""\blibrary\b["'`]?\s*[=!]""", options.match):
        why = "all others would seem unused"
        raise ValueError(f"--match must not be about the library: {why}")
    more = options.match[1:-1].strip(" ,")
    return f"__name__={quoted(options.metric)},{more}".rstrip(",")


def selector(labels: "Labels", more: str) -> str:
    """Return PromQL for all that has these labels."""
    for name, value in sorted(labels):
        more += f",{name}={quoted(value)}"
    return "{" + more + "}"


def quoted(text: str) -> str:
    """Return a string as PromQL writes it."""
    import json

    return json.dumps(text, ensure_ascii=False)


def library_of(labels: "Labels") -> str:
    return normalized(dict(labels).get("library", ""))


def target_of(labels: "Labels") -> "Labels":
    """Return the labels that tell which exporter was scraped."""
    return frozenset(pair for pair in labels if pair[0] in ("job", "instance"))


def parted_by_start(samples: "Samples") -> "list[tuple[float, list[float]]]":
    """Return the lives of an exporter: when each began, and when it was scraped."""
    lives: list[tuple[float, list[float]]] = []
    for when, start in samples:
        if lives:
            known, times = lives[-1]
            # Where a clock was set meanwhile, the start moves, but by less than the
            # life has lasted. Two starts may be told wrongly by a second each.
            latest = known + times[-1] - times[0] - 2
            if start == known or known - 60 < start <= latest:
                times.append(when)
                continue
        lives.append((start, [when]))
    return lives


def fetch(url: str, form: "dict[str, Any]", options: "argparse.Namespace") -> str:
    """Return what a web server answers; a long form goes by POST. Raises OSError."""
    from http.client import HTTPException
    from urllib.parse import urlencode
    from urllib.request import HTTPErrorProcessor, Request, build_opener

    class NoRedirects(HTTPErrorProcessor):  # headers may hold a secret
        def http_response(self, request: "Any", response: "Any") -> "Any":
            return response

        https_response = http_response

    check_url(url)
    shown = url.partition("?")[0]
    data = urlencode(form)
    body = None
    if len(data) > 2000:
        body = data.encode()
    elif data:
        url = f"{url}?{data}"
    request = Request(url, body, headers(options))
    try:
        with build_opener(NoRedirects).open(request, timeout=120) as answer:
            text: str = answer.read(ANSWER_LIMIT).decode("utf-8", "replace")
            if answer.length or answer.read(1):  # of what Content-Length tells
                raise OSError("its answer is cut off, or has no end")
    except (OSError, ValueError, HTTPException) as error:
        why = getattr(error, "reason", "") or error or type(error).__name__
        raise OSError(f"{shown} cannot be read: {why}") from None
    if answer.status != 200:
        why = answer.headers.get("Location", "").partition("?")[0] or told_error(text)
        if answer.status == 404 and options.prometheus:
            why = IS_EXPORTER
        said = f"{shown} answers {answer.status} {answer.reason}: {why}"
        raise OSError(said.rstrip(": "))
    return text


def check_url(url: str) -> None:
    """Raise ValueError, without what may be a secret, if a URL is wrong."""
    import re

    if not url.startswith(("http://", "https://")):
        raise ValueError("http:// is missing: a URL is such as http://localhost:9090")
    if not re.fullmatch(r"https?://[^/?@\s]+(/[!-~]*)?", url):
        raise ValueError(
            "the URL must be such as http://localhost:9090, and a password "
            "is given as --header @FILE"
        )


def told_error(text: str) -> str:
    """Return what Prometheus says is wrong, which it does in JSON."""
    import json

    try:
        return str(json.loads(text)["error"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


def headers(options: "argparse.Namespace") -> "dict[str, str]":
    """Return the headers that are given. Raises ValueError or OSError, no secrets."""
    import re

    found: dict[str, str] = {}
    for text in options.header:
        if text.startswith("@"):
            try:
                with open(text[1:], encoding="utf-8", errors="replace") as file:
                    text = file.read()
            except OSError as error:
                raise OSError(f"--header {text}: {error.strerror}") from None
        pairs = re.findall(r"(?m)^[ \t]*([\w-]+)[ \t]*:[ \t]*([ -~]*)$", text)
        if not pairs:
            raise ValueError("--header must be 'Name: value', or @FILE with such lines")
        found.update(pairs)
    return found


# -- what is installed

# That nobody imports these says nothing: they host the sessions, install the others,
# or are loaded before counting begins.
HOSTS = """
    conda ipykernel ipython jupyter jupyter-server jupyterhub jupyterlab mamba
    nbclassic notebook pip popcon popularity-contest setuptools uv voila wheel
"""
SCRIPTS = {"console_scripts", "gui_scripts"}
# With one of these a process becomes another program, or ends, without a report.
ENDS = [
    b"execv",
    b"execl",
    b"os._exit",
    b"os.abort",
    b"raise_signal",
    b"kill(os.getpid()",
]
# Others find such files by their paths. Those in NAME.libs are known to nobody else.
SHARED = r"""(?x) (?!.*\.(dy)?libs/) .*/
    (lib (?!.*\.(cpython|abi3|pypy)) [^/]* \.so[\d.]* | [^/]*\.(dll|dylib)) $"""


class Library:
    """What is known of one library, be it installed or only counted."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.version: str | None = None
        self.folder = ""  # on sys.path, with "/"
        self.files: dict[str, str] = {}  # in full and with "/", and their kinds
        self.size: int | None = None  # bytes, as far as a RECORD tells
        self.requirements: list[Requirement] = []
        self.groups: set[str] = set()  # of its entry points
        # Whether processes may import its requirements, or its extras, unseen.
        self.is_silent = False
        self.reason = ""  # why it proves nothing that nobody imports it
        self.installer = ""
        self.was_asked_for = False  # by a person, on a command line or in a list
        # What judged() finds out:
        self.processes: int | None = 0  # None: fewer than may be told
        self.status = "absent"
        self.group = "absent"  # the same, or "rare"
        self.required_by: list[str] = []  # those that stay
        self.takes: set[str] = set()  # what it requires, and so on
        self.brought_by: set[str] = set()  # which of those that can go
        self.row = name  # of the table

    def paths(self, *kinds: str) -> "list[str]":
        """Return its files of these kinds."""
        return [path for path, kind in self.files.items() if kind in kinds]

    def top_levels(self) -> "set[str]":
        """Return the names of what lies at the top of its folder."""
        start = self.folder + "/"
        below = [path for path in self.files if path.startswith(start)]
        return {path[len(start) :].partition("/")[0] for path in below}

    def as_json(self) -> "dict[str, Any]":
        reason = ""
        if self.status == "unknown":
            reason = self.reason
        return {
            "library": self.name,
            "version": self.version,
            "bytes": self.size,
            "processes": self.processes,
            "status": self.status,
            "required_by": self.required_by,
            "reason": reason,
            "requested": self.was_asked_for,
            "brought_by": sorted(self.brought_by),
        }


def installed_libraries() -> "tuple[dict[str, Library], dict[str, list[Requirement]]]":
    """Return what is installed, and what each name requires, by all metadata of it."""
    words = words_of_settings()
    installed: dict[str, Library] = {}
    wants: dict[str, list[Requirement]] = {}
    owner: dict[str, str] = {}
    for distribution in distributions():
        library = library_of_metadata(distribution, words)
        name = library.name
        wants.setdefault(name, []).extend(library.requirements)
        is_source_tree = not distribution.folder.endswith(("-packages", ".egg"))
        if name in installed or library.size is None and is_source_tree:
            continue
        installed[name] = library
        for path in library.paths("module", "command"):
            # Who removes one of two that share a file breaks the other.
            other = owner.setdefault(path, name)
            if other != name:
                wants[name].append(Requirement(other))
                wants[other].append(Requirement(name))
    doubt_requests(list(installed.values()))
    return installed, wants


def doubt_requests(libraries: "list[Library]") -> None:
    """Forget who was asked for where the installer says so of every library, as uv."""
    others = [library for library in libraries if library.installer != "pip"]
    if all(library.was_asked_for for library in others):
        for library in others:
            library.was_asked_for = False


def distributions() -> "Iterator[Distribution]":
    """Yield all that is installed, in the order of sys.path."""
    for folder in dict.fromkeys(map(os.path.realpath, sys.path)):
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            if name.endswith(METADATA_SUFFIXES):
                yield Distribution(folder, name)


def library_of_metadata(distribution: Distribution, words: "set[str]") -> Library:
    """Return the library of these metadata; words are those of Jupyter's settings."""
    import re

    stem, _, rest = distribution.info.rpartition(".")[0].partition("-")
    name = distribution.name() or normalized(stem)
    library = Library(name or readable(distribution.info, 60))
    library.version = rest.partition("-")[0]
    library.folder = distribution.folder.replace(os.sep, "/")
    library.files = files_of(distribution)
    if library.files:
        library.size = sum(map(size_of_file, library.files))
    library.requirements = requirements(distribution)
    entry_points = decoded(distribution.read("entry_points.txt"))
    library.groups = set(re.findall(r"(?m)^[ \t]*\[[ \t]*([^]\s]+)", entry_points))
    library.installer = decoded(distribution.read("INSTALLER")).strip()
    library.was_asked_for = os.path.exists(
        os.path.join(distribution.folder, distribution.info, "REQUESTED")
    )
    why_silent = silence_of(library)
    library.is_silent = bool(why_silent)
    library.reason = reason_of(library, distribution, words, why_silent)
    return library


def size_of_file(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def files_of(distribution: Distribution) -> "dict[str, str]":
    """Return the paths that a RECORD lists, in full and with "/", and their kinds."""
    from importlib.machinery import all_suffixes

    folder = distribution.folder.replace(os.sep, "/")
    suffixes = tuple(all_suffixes())
    found = {}
    for path in listed_paths(decoded(distribution.read("RECORD"))):
        if path:
            full = os.path.normpath(os.path.join(folder, path)).replace(os.sep, "/")
            kind = kind_of(full, folder, suffixes)
            # owners() finds those modules alone that are below, plainly.
            if kind == "module" and (full != f"{folder}/{path}" or "\\" in path):
                kind = "odd"
            found[full] = kind
    return found


def kind_of(path: str, folder: str, suffixes: "tuple[str, ...]") -> str:
    """Tell whether a path is one of a module, a command, a shared library, or other."""
    import re

    parent = path.split("/")[-2]
    if parent in ("bin", "Scripts") and path.count("/") <= folder.count("/") + 2:
        return "command"  # beside the modules, as of pip --target, or above
    if not path.endswith(".py") and re.match(SHARED, path):
        return "shared"
    # pip compiles commands, too, and these are no modules.
    if parent != "__pycache__" and path.endswith(suffixes):
        return "module"
    return "other"


# Reasons of those whose processes do not report: nobody knows what they import.
IS_HOST = "runs sessions, or installs"
IS_SERVER = "serves Jupyter"
IS_KERNEL = "extends ipykernel"
IS_COMMAND = "its commands do not report"
OPTIONAL = "optional: "  # for these, which do not report


def silence_of(library: Library) -> str:
    """Return why a library's processes may import others without a report, or ""."""
    if library.name in HOSTS.split():
        return IS_HOST
    if any("/etc/jupyter/jupyter_" in path for path in library.files):
        return IS_SERVER
    for requirement in library.requirements:
        if requirement.name == "ipykernel" and not requirement.only_for:
            return IS_KERNEL
    commands = library.paths("command")
    modules = library.paths("module")
    is_program = bool(commands) or not SCRIPTS.isdisjoint(library.groups)
    # What has plug-ins of its own may be a server, which is killed at its end, as
    # python-lsp-server with its package pylsp.
    is_server = not library.groups.isdisjoint(library.top_levels())
    if is_program and (is_server or not everyone_reports()):
        return IS_COMMAND
    if is_program or any(path.endswith("/__main__.py") for path in modules):
        for path in commands:
            if b"python" not in read(path).partition(b"\n")[0]:
                return IS_COMMAND
        if any(map(ends_processes, commands + modules)):
            return IS_COMMAND
    return ""


def ends_processes(path: str) -> bool:
    """Tell whether a source may end its process so that popcon does not report."""
    if path.endswith((".so", ".pyd", ".pyc")) or "/tests/" in path:
        return False
    text = read(path)
    return any(end in text for end in ENDS)


def reason_of(
    library: Library,
    distribution: Distribution,
    words: "set[str]",
    why_silent: str,
) -> str:
    """Return why a library may be in use though nobody imports it, or ""."""
    import re

    top_levels = library.top_levels()
    names = {name.partition(".")[0] for name in top_levels}
    paths = "\n".join(library.files)
    if why_silent == IS_HOST:
        return IS_HOST
    url = b"".join(distribution.read("direct_url.json").split())
    if b'"editable":true' in url:
        return "editable, never counted"
    if any(re.search(r"(\.pth|\.start|customize\.py)$", name) for name in top_levels):
        return "takes part in every start"
    if why_silent == IS_SERVER:
        return IS_SERVER
    if "/etc/jupyter/" in paths or "/share/jupyter/" in paths:
        return "extends Jupyter"
    if not distribution.name():
        return "its metadata have no name"
    if not library.files:
        return "has no RECORD of its files"
    if library.paths("odd"):
        return "odd paths in its RECORD"
    if not library.paths("module"):
        return "nothing to import"
    if is_stubs(distribution, names):
        return "holds type stubs"
    if why_silent == IS_KERNEL:
        return IS_KERNEL
    if is_plug_in(library):
        return "a plug-in, others find it"
    if why_silent:
        return why_silent
    if library.paths("shared"):
        return "holds shared libraries"
    if not words.isdisjoint(names):
        return "named in Jupyter's settings"
    return ""


def is_stubs(distribution: Distribution, names: "set[str]") -> bool:
    """Tell whether a library holds types for another one (PEP 561)."""
    if "Classifier: Typing :: Stubs Only" in distribution.header():
        return True
    for name in names:
        if name.endswith("-stubs") and name.removesuffix("-stubs") not in names:
            return True
    return False


def is_plug_in(library: Library) -> bool:
    """Tell whether it has entry points for others, not as markdown.extensions."""
    for group in library.groups - SCRIPTS:
        if not f"{normalized(group)}-".startswith(f"{library.name}-"):
            return True
    return False


def words_of_settings() -> "set[str]":
    """Return the words in Jupyter's and IPython's settings, but for remarks."""
    import re
    from glob import escape, glob

    words = set()
    for prefix in (sys.prefix, "/usr/local", "/usr", "/"):
        for below in ("etc/ipython", "etc/jupyter", "share/jupyter/kernels"):
            for path in glob(f"{escape(prefix)}/{below}/**", recursive=True):
                text = re.sub(r"(?m)^[ \t]*#.*", "", text_of(path))
                words.update(re.findall(r"\w+", text))
    return words


# -- who requires what

ANY_EXTRA = "*"


class Requirement:
    """What a line of Requires-Dist asks for (PEP 508)."""

    def __init__(self, text: str) -> None:
        import re

        what, _, marker = text.partition(";")
        name, _, extras = what.partition("]")[0].partition("[")
        self.name = normalized(re.split(r"[^\w.-]", name.strip())[0])
        self.extras = {"", *map(normalized, extras.split(","))}
        # Extras that bring it; none: it is always required. Of a marker only these
        # are read: the rest is taken to hold, to be safe.
        self.only_for: set[str] = set()
        for way in re.split(r"\bor\b", marker):
            named = re.findall(r"""\bextra\s*==\s*["']([\w.-]+)""", way)
            if not named:
                self.only_for = set()
                break
            self.only_for.update(map(normalized, named))


def requirements(distribution: Distribution) -> "list[Requirement]":
    """Return what the metadata require; those of an egg-info may have requires.txt."""
    lines = []
    for line in distribution.header():
        field, _, value = line.partition(":")
        if field.lower() == "requires-dist":
            lines.append(value)
    marker = ""
    for line in decoded(distribution.read("requires.txt")).split("\n"):
        if line.startswith("["):  # [extra:marker], for the lines that follow
            extra = line.strip("[]").partition(":")[0]
            marker = f"; extra == {extra!r}"
        elif line:
            lines.append(line + marker)
    return list(map(Requirement, lines))


def required(
    names: "Iterable[str]",
    installed: "dict[str, Library]",
    wants: "dict[str, list[Requirement]]",
) -> "tuple[Graph, Graph]":
    """Return who requires each library, of the names and of all that these require.

    The second tells the same of extras that may be in use, as nobody knows better.
    """
    needed: Graph = {}
    optional: Graph = {}
    queue = []
    for name in names:
        is_silent = name in installed and installed[name].is_silent
        queue.append((name, ANY_EXTRA if is_silent else ""))
    seen = set(queue)
    while queue:
        name, extra = queue.pop()
        for want in wants.get(name, ()):
            graph = needed
            if want.only_for and extra not in want.only_for:
                graph = optional
                if extra != ANY_EXTRA or want.name == name:
                    continue
            if want.name != name:
                graph.setdefault(want.name, set()).add(name)
            for asked in want.extras:
                pair = (want.name, asked)
                if pair not in seen:
                    seen.add(pair)
                    queue.append(pair)
    return needed, optional


# -- the verdict


def judged(counts: Counts, options: "argparse.Namespace") -> "list[Library]":
    """Return each library, installed or counted, with the verdict on it, by name."""
    installed, wants = installed_libraries()
    give_reasons(installed, options)
    libraries = dict(installed)
    many = set()
    for name, number in counts.processes.items():
        library = libraries.setdefault(name, Library(name))
        library.processes = max(1, round(number))
        if library.processes < options.at_least:
            library.processes = None
        if number > options.at_most:
            many.add(name)
    stays = wants.keys() - installed.keys()  # source trees, for instance
    for name, library in installed.items():
        if library.reason:
            stays.add(name)
    needed, optional = required(stays.union(counts.processes), installed, wants)
    needed_by_many, optional_of_many = required(stays | many, installed, wants)
    kept = stays.union(many, needed_by_many, optional_of_many)
    for name, library in installed.items():
        library.required_by = sorted(needed.get(name, ()))
        if name in optional and not library.reason:
            library.reason = OPTIONAL + ", ".join(sorted(optional[name]))
        if not library.reason:
            library.reason = counts.doubt.partition(":")[0]
        library.status = status_of(library)
        library.group = library.status
        if library.status == "unused":
            library.takes = set(required({name}, installed, wants)[0])
        elif name not in kept and not counts.doubt:
            library.group = "rare"
    bundle(installed, optional)
    return sorted(libraries.values(), key=lambda library: library.name)


def give_reasons(
    installed: "dict[str, Library]", options: "argparse.Namespace"
) -> None:
    """Give those a reason that are loaded at every start, or that are to be kept."""
    from fnmatch import filter as matching
    from re import sub

    reasons = {}
    loaded = executed_files(dict(sys.modules))
    for name in owners(loaded, loaded):
        reasons[name] = "loaded at every start"
    for pattern in options.keep:
        names = matching(installed, sub("[-_.]+", "-", pattern).lower())
        for name in names:
            reasons[name] = "to be kept"
        if not names:
            shown = readable(pattern, 60)
            note(f"nothing installed is called {shown!r}, which was to be kept")
    for name in installed.keys() & reasons.keys():
        installed[name].reason = installed[name].reason or reasons[name]


def status_of(library: Library) -> str:
    """Return what is known of an installed library."""
    if library.processes != 0:
        return "used"
    if library.required_by:
        return "required"
    if library.reason:
        return "unknown"
    return "unused"


def bundle(installed: "dict[str, Library]", optional: "Graph") -> None:
    """Find the names to be struck from a list, and all that was brought by them."""
    gone = [library for library in installed.values() if library.status == "unused"]
    # Who takes most comes first: what that brought needs not be struck itself.
    gone.sort(key=lambda one: (-len(one.takes), not one.was_asked_for, one.name))
    for library in gone:
        if not library.brought_by:
            for name in library.takes & installed.keys() - {library.name}:
                other = installed[name]
                stays = other.was_asked_for or other.required_by or name in optional
                if not stays:
                    other.brought_by.add(library.name)
    for library in gone:
        if library.brought_by:
            library.row = min(library.brought_by)
        if len(library.brought_by) > 1:
            library.row = SEVERAL


# -- the table

SEVERAL = "(for several of these)"
ALL = 10**6
# Rows without --all, of groups that ask for nothing, or have many.
LIMITS = {"used": 20, "unknown": 20, "required": 0, "absent": 5}
TITLES = {
    "used": "Used, by how many processes",
    "rare": "Rarely used, by at most ",
    "unused": "Can go",
    "unknown": "Cannot be judged",
    "required": "Needed by others",
    "absent": "Counted, but not installed here",
}


def table(
    libraries: "list[Library]", counts: Counts, options: "argparse.Namespace"
) -> "list[str]":
    """Return the lines of the table; the conclusion comes last."""
    from textwrap import wrap
    from time import gmtime, strftime

    width = width_of_terminal()
    since = strftime("%Y-%m-%d %H:%M UTC", gmtime(counts.since))
    here = [library for library in libraries if library.status != "absent"]
    python = f"Python {sys.version.split()[0]} in {sys.prefix}"
    number = some(len(here), "library", "libraries")
    lines = [
        f"{python}: {number}, {size_of(here)}".rstrip(", "),
        f"Window: {options.window.text}; counted since {since}",
    ]
    for group, title in TITLES.items():
        members = [library for library in libraries if library.group == group]
        if group == "rare":
            title += some(options.at_most, "process", "processes")
        limit = LIMITS.get(group, ALL)
        if counts.doubt and group == "unknown":
            limit = 0
        if options.all:
            limit = ALL
        if members:
            lines += section(title, members, limit, options, width)
    lines.append("")
    for sentence in conclusion(here, counts.doubt, since):
        lines += wrap(sentence, width)
    return lines


def width_of_terminal() -> int:
    """Return the width of lines: in a pipe nothing is cut."""
    from shutil import get_terminal_size

    if sys.stdout is None or not sys.stdout.isatty():
        return ALL
    return max(60, get_terminal_size().columns)


def section(
    title: str,
    members: "list[Library]",
    limit: int,
    options: "argparse.Namespace",
    width: int,
) -> "list[str]":
    """Return a title, and rows; in one row are the libraries that go along."""
    rows: dict[str, list[Library]] = {}
    for library in members:
        rows.setdefault(library.row, []).append(library)
    order = sorted(rows.values(), key=by_use)
    number = f"{len(members):,}, {size_of(members)}".rstrip(", ")
    lines = ["", f"{title} ({number})"]
    most = max(1, order[0][0].processes or 0)
    for row in order[:limit]:
        begin = f"  {row[0].row:23} {size_of(row):>8}  "
        text = remark(row, options, width - len(begin))
        if row[0].group == "used":
            length = min(40, width - 47) * (row[0].processes or 0) / most
            text += "  " + "#" * round(length)
        lines.append(f"{begin}{text}"[:width].rstrip())
    if limit == 0:
        lines[-1] += ": --all lists them"
    elif len(order) > limit:
        lines.append(f"  {len(order) - limit:,} more: --all lists them")
    return lines


def remark(row: "list[Library]", options: "argparse.Namespace", room: int) -> str:
    """Return what stands behind the size."""
    first = row[0]
    if first.processes is None:
        return f"<{options.at_least}".rjust(9)
    if first.processes or first.group == "rare":
        return f"{first.processes:>9,}"
    if first.status == "required":
        return few(first.required_by, room)
    if first.status == "unused":
        return companions(row, room)
    begin, names = first.reason, sorted(first.brought_by)
    if names:
        begin += "; only for "
    elif begin.startswith(OPTIONAL):
        names = begin.removeprefix(OPTIONAL).split(", ")
        begin = OPTIONAL
    return begin + few(names, room - len(begin))


def companions(row: "list[Library]", room: int) -> str:
    """Return what goes along with a name that is struck."""
    first = row[0]
    names = [library.name for library in row if library.name != first.row]
    if first.row == SEVERAL:
        return few(names, room)
    if names:
        return "with " + few(names, room - len("with "))
    if first.installer == "pip" and not first.was_asked_for:
        return "not asked for: an extra, or left over"
    return ""


def conclusion(here: "list[Library]", doubt: str, since: str) -> "list[str]":
    """Return in sentences what follows from the counts, and how it is known."""
    gone = [library for library in here if library.status == "unused"]
    all_here = some(len(here), "library", "libraries")
    if doubt:
        return [doubt]
    if not gone:
        return [f"None of {all_here} can go."]
    rows = {library.row for library in gone} - {SEVERAL}
    names = some(len(rows), "name", "names")
    who = "process" if everyone_reports() else "session"
    sentences = [
        f"{len(gone)} of {all_here} can go, {size_of(gone)} of {size_of(here)}: "
        f"strike {names} from your list of requirements.",
        f"No {who} that reported has imported them since {since}, "
        "and nothing that stays needs them.",
    ]
    left = [library for library in here if library.status in ("used", "unknown")]
    brought = [library.name for library in left if library.brought_by]
    if brought:
        sentences.append(
            f"A new environment without these names also lacks {few(brought, 100)}: "
            "put on the list what people use, and what you want to keep."
        )
    return sentences


def by_use(row: "list[Library]") -> "tuple[bool, int, int]":
    """Return a key to sort rows by falling numbers of processes, then by size."""
    return row[0].row == SEVERAL, -(row[0].processes or 0), -total(row)


def total(libraries: "list[Library]") -> int:
    return sum(library.size or 0 for library in libraries)


def size_of(libraries: "list[Library]") -> str:
    """Return how much room libraries take, "" where that is not known of any."""
    if all(library.size is None for library in libraries):
        return ""
    size = total(libraries) / 1e6
    if size >= 999.5:
        return f"{size / 1000:.1f} GB"
    if size >= 99.95:
        return f"{size:.0f} MB"
    return f"{size:.1f} MB"


def some(number: int, one: str, many: str) -> str:
    """Return the number with the noun in its singular or plural."""
    noun = one if number == 1 else many
    return f"{number:,} {noun}"


def few(names: "list[str]", room: int) -> str:
    """Return as many names as there is room for, and how many more there are."""
    if not names:
        return ""
    for number in range(len(names), 0, -1):
        text = ", ".join(names[:number])
        if number < len(names):
            text += f" and {len(names) - number} more"
        if len(text) <= room:
            return text
    return some(len(names), "name", "names")


# -- its options


def whole_number(text: str) -> int:
    """Return a number of processes. argparse shows what is wrong."""
    from argparse import ArgumentTypeError

    if not (text.isascii() and text.isdigit()):
        raise ArgumentTypeError(f"{text!r} is no whole number from 0 up")
    return int(text)


def add_usage_options(parser: "argparse.ArgumentParser") -> None:
    """Add the options of the command usage to its parser."""
    add_source_options(parser)
    parser.add_argument(
        "--window",
        type=Window,
        default="90d",
        help="Look back for so long, in units of m, h, d, w or y (default: 90d).",
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="Never say that these libraries can go: names, or patterns as 'azure-*'.",
    )
    parser.add_argument(
        "--at-most",
        type=whole_number,
        default=0,
        metavar="K",
        help="List what at most K processes used as rarely used.",
    )
    parser.add_argument(
        "--at-least",
        type=whole_number,
        default=0,
        metavar="K",
        help="Show numbers of processes below K as <K, so that they point at nobody.",
    )
    parser.add_argument("--all", action="store_true", help="Show all rows.")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--unused", action="store_true", help="Print only the names that can go."
    )
    form.add_argument("--json", action="store_true", help="Print all as JSON.")


def add_source_options(parser: "argparse.ArgumentParser") -> None:
    """Add the options that tell where the counts are."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prometheus",
        default="",
        metavar="URL",
        help="Read the counts from Prometheus, at http://prometheus:9090 for instance.",
    )
    source.add_argument(
        "--metrics",
        default="",
        metavar="FILE_OR_URL",
        help="Read them from the file of collect, or an exporter's /metrics instead.",
    )
    parser.add_argument(
        "--match",
        type=str.strip,
        default="{}",
        metavar="LABELS",
        help="""Take only the counters with these labels: '{namespace="prod"}'.""",
    )
    parser.add_argument(
        "--metric",
        default="",
        metavar="NAME",
        help="The name of the counters, if your mapping makes another of the prefix.",
    )
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="HEADER",
        help="Send 'Name: value' to the server, or the lines of a file, as @FILE.",
    )


# ---- the options --------------------------------------------------------------------


def command_line() -> "argparse.ArgumentParser":
    """Return the parser of the command line; what it parses has run, the command."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> "NoReturn":
            self.exit(2, f"popcon: {' '.join(message.split())}; -h tells more\n")

    parser = Parser(
        prog="python -m popcon",
        description="Tell which installed libraries people use, and not who uses them.",
        epilog=f"Begin with `install`, and set {HOST} to the name of a statsd server, "
        "for which `collect` will do. Then `selftest` shows whether it works. "
        "COMMAND -h tells more of each.",
    )
    parser.add_argument("--version", action="version", version=f"popcon {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(command: "Command") -> "argparse.ArgumentParser":
        text = command.__doc__ or ""  # `python -OO` leaves none
        short = text.partition("\n")[0]
        added = commands.add_parser(command.__name__, help=short, description=text)
        added.set_defaults(run=command)
        return added

    text = "Let every Python process of it report."
    add(install).add_argument("--all-processes", action="store_true", help=text)
    add_selftest_options(add(selftest))
    add_run_options(add(run))
    add_collect_options(add(collect))
    add_usage_options(add(usage))
    add(uninstall)
    return parser


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run the command line, and return the exit status.

    What a command cannot do, it raises as an OSError; that, and misuse, ends with 2.
    """
    sys.path[:0] = STANDARD_FOLDERS  # so that no command runs a person's own json.py
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for paths it can't encode
    try:
        options = command_line().parse_args(arguments)
        status: int = options.run(options)
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        return 130  # as the shell says it
    except BrokenPipeError:
        pass  # who reads it is gone, as with `| head -1`
    except OSError as error:
        note(str(error))
    try:
        print(end="", flush=True)
    except OSError:  # else Python tries to write the rest at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 2


if __name__ == "__main__":
    sys.exit(main())
