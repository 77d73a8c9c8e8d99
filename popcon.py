"""popcon: which installed libraries do people really use, and which does nobody?

When a Python process ends, popcon works out which installed libraries were
imported in it, and adds one to a global counter for each, over the statsd
protocol. One UDP datagram like this is all that leaves the process:

    python_popcon.library_used.numpy:1|c
    python_popcon.library_used.pandas:1|c

No user, no process, no time, no file name, nothing of a person's own code.

Switch it on with `python -m popcon install`, for every IPython and Jupyter session
of the environment, or with two lines at the top of a script:

    import popcon
    popcon.setup_reporter()

and by telling it where the statsd server is. Switch it off by leaving the host
empty, or with DO_NOT_TRACK=1, or with `python -m popcon uninstall`. Try it out with
`python -m popcon selftest`; see what a program would send with `python -m popcon run`,
and what all of them have used, and which libraries can go, with `python -m popcon usage`.

    PYTHON_POPCONTEST_STATSD_HOST         name or address; nothing is sent without it
    PYTHON_POPCONTEST_STATSD_PORT         default 9125
    PYTHON_POPCONTEST_STATSD_PREFIX       default python_popcon.library_used
    PYTHON_POPCONTEST_STATSD_SAMPLE_RATE  share of processes that report; default 1
    PYTHON_POPCONTEST_DEBUG               set to 1: says on stderr what was sent, or why nothing was
    PYTHON_POPCONTEST_PROMETHEUS_HEADER   for `usage`: a header that Prometheus wants, 'Authorization: Bearer ...'
    DO_NOT_TRACK                          set, and not 0: nothing is ever sent

The file reads along the way of the data: sys.modules, the files executed since
the baseline, the libraries that own them, statsd lines, datagrams, the socket.
The command line comes last, and is compiled only where it is run.
"""

# Every process pays for what is imported here: nothing that a bare interpreter
# has not loaded already. The rest is imported when it is needed.
import _thread
import atexit
import os
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import PathFinder, SourceFileLoader, SourcelessFileLoader

# Annotations of more than a name are quoted, so that no process has to evaluate them.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

__version__ = "1.0.0"
__all__ = ["report", "setup_reporter", "used_libraries"]

STDLIB = os.path.dirname(getattr(os, "__file__", os.path.join("none", "os.py"))) + os.sep
OWN = STDLIB, os.path.join(sys.base_prefix, "DLLs", "")  # the latter on Windows
DYNLOAD = f"{os.sep}lib-dynload{os.sep}"
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


# ---- sys.modules -> the files that were executed ------------------------------

# What sys.modules holds may answer any question with code of its own, and a lazily
# loaded module would wake. These read an object's namespace or classes without asking it.
_module_namespace = vars(type(sys))["__dict__"].__get__
_class_namespace = vars(type)["__dict__"].__get__
_class_order = vars(type)["__mro__"].__get__


def _odd_namespace(name: str, module: object, lazy: object) -> "Mapping[str, Any]":
    """Return the namespace in which something that is no plain module was executed, if it was."""
    kind = type(module)
    if type(lazy) is type and issubclass(kind, lazy):
        return {}  # once it is touched, LazyLoader gives it back a class of its own
    try:
        namespace: Mapping[str, Any] = _module_namespace(module)
    except TypeError:
        namespace = {}  # no module at all; to look into what objects hold may run their code
    if namespace.get("__file__") is None and namespace.get("__spec__") is None:
        # A module that put an object in its own place, as sh does: functions know where they
        # were executed, be it the object itself or a method of its class.
        values: list[object] = [module]
        for part in _class_order(kind) + (_class_order(module) if issubclass(kind, type) else ()):
            values += _class_namespace(part).values()
        for value in values:
            if type(value) is property:
                value = value.fget
            elif type(value) is staticmethod or type(value) is classmethod:
                value = value.__func__
            if type(value) is type(_odd_namespace) and type(value.__globals__) is dict:
                origin = value.__globals__.get("__name__")
                if type(origin) is str and origin == name:
                    return value.__globals__
    return namespace


def executed_files(modules: "Mapping[Any, object]") -> "dict[str, str]":
    """Map the file of every executed module to the module's dotted name.

    Takes a copy of sys.modules. Leaves the standard library out. A module without a file, from a loader of somebody's
    own, stands under its name instead. Runs no code of the modules.
    """
    plain, module_namespace = type(sys), _module_namespace
    util = sys.modules.get("importlib.util")
    lazy = _module_namespace(util).get("_LazyModule") if type(util) is plain else None
    files = {}
    for name, module in modules.items():
        if type(name) is not str:
            continue
        try:
            namespace = module_namespace(module) if type(module) is plain else _odd_namespace(name, module, lazy)
            file, spec = namespace.get("__file__"), namespace.get("__spec__")
            if type(spec) is ModuleSpec:
                if "__builtins__" not in namespace and type(module) is plain and _was_only_made(spec):
                    continue
                if type(file) is not str:
                    name = spec.name
                    if spec.has_location:
                        file = spec.origin
                    elif type(name) is str and _is_custom(spec.loader):
                        files[name] = name
                elif file is spec.origin:
                    name = spec.name  # the key in sys.modules may be an alias
                elif spec.has_location and spec.name == name:
                    file = spec.origin  # the module rewrote __file__, as tlz does
            elif name in ("__main__", "__mp_main__"):
                continue  # a script, somebody's own; run with -m it would have a spec
        except Exception as error:
            debug(f"cannot tell the file of {name}: {error!r}")
            continue
        if type(file) is str and os.sep in file and type(name) is str:  # not "<string>"
            standard = file.startswith(OWN) and "-packages" not in file[len(STDLIB) :]
            if not standard and DYNLOAD not in file:
                files[file] = name
    return files


def _was_only_made(spec: ModuleSpec) -> bool:
    """Tell whether a module to which exec() has added no __builtins__ was never executed.

    The *-nspkg.pth files of old namespace packages make modules of another library's __init__.py so.
    What import itself executes has a mark in its spec, whatever the module has made of itself.
    """
    kind = type(spec.loader)
    return (kind is SourceFileLoader or kind is SourcelessFileLoader) and not hasattr(spec, "_initializing")


def _is_custom(loader: object) -> bool:
    """Tell whether the loader is neither Python's own nor missing."""
    kind = type(loader)  # of what is built in or frozen, the loader is a class
    own = ("_frozen_importlib", "_frozen_importlib_external", "zipimport")
    module = _class_namespace(kind).get("__module__")
    return loader is not None and kind is not type and type(module) is str and module not in own


# ---- files -> the libraries that own them -------------------------------------


def libraries(*groups: "Mapping[str, str]") -> "list[set[str]]":
    """Return for each group of files the names of the libraries that own one of them.

    Takes mappings as executed_files() makes them; all are answered in one pass
    over the metadata. A library's name is normalised as PEP 503 says. Metadata
    beside the modules decides: RECORD (PEP 376, PEP 627) where there is one.
    """
    origins: dict[str, str] = {}  # of each directory with modules the one they were imported from
    grouped: list[dict[str, list[str]]] = []  # of each group the names in each of those directories
    for group in groups:
        places: dict[str, list[str]] = {}
        for file, name in group.items():
            place, _, base = file.rpartition(os.sep)
            if place in places:
                places[place].append(base)
            else:
                places[place] = [base]
                if place not in origins:
                    origins[place] = place.rsplit(os.sep, name.count(".") + base.startswith("__init__."))[0]
        grouped.append(places)
    # A .pth file or a library may have put one of its own folders on sys.path (pywin32
    # does): the modules there belong to a folder further up.
    folders = {*origins.values(), *(entry.rstrip(os.sep) for entry in import_path())}
    relative: dict[str, list[list[str]]] = {}  # of each of these folders the paths below it, by group
    for index, places in enumerate(grouped):
        for place, bases in places.items():
            folder = place
            while folder:
                if folder in folders:
                    start = f"{place}{os.sep}"[len(folder) + 1 :]
                    relative.setdefault(folder, [[] for _ in groups])[index].extend([start + base for base in bases])
                folder = folder.rpartition(os.sep)[0]
    owners: list[dict[str, str]] = [{} for _ in groups]  # by metadata folder the library's name
    for folder in sorted(relative, key=len, reverse=True):
        # Where one folder lies in another, the outer one may own the metadata in the inner one: what
        # setuptools brings along in its _vendor folder was not installed by anybody.
        inner = sorted({info for names in owners for info in names if info.startswith(folder + os.sep)})
        below = [info[len(folder) + 1 :] for info in inner]
        paths = relative[folder] + [[info, f"{info}{os.sep}METADATA", f"{info}{os.sep}PKG-INFO"] for info in below]
        try:
            try:
                more = _folder_owners(folder, os.listdir(folder), paths)
            except NotADirectoryError:
                more = _archive_owners(folder, paths) if os.path.isfile(folder) else []
        except Exception as error:
            debug(f"cannot read {folder}: {error!r}")
            continue
        for names, new in zip(owners, more):
            names |= new
        for info, named in zip(inner, more[len(groups) :]):
            vendors = {other: name for other, name in named.items() if _read(f"{other}{os.sep}RECORD", 1)}
            for names in owners if vendors else ():
                if names.pop(info, None):
                    names |= vendors
    found = [{*names.values()} for names in owners]
    virtual = [places.get("", []) for places in grouped]
    if any(virtual):
        try:
            for used, others in zip(found, _virtual_owners(virtual)):
                used |= others
        except Exception as error:
            debug(f"cannot tell whose {virtual} are: {error!r}")
    return found


def import_path() -> "list[str]":
    """Return what of sys.path can name a folder; a program may put anything there."""
    return [entry for entry in sys.path if type(entry) is str and "\0" not in entry] if type(sys.path) is list else []


def metadata_folders(folder: str, entries: "list[str]") -> "list[str]":
    """Return the paths of the metadata folders or files (PEP 376) among the entries of the folder."""
    infos = [f"{folder}{os.sep}{entry}" for entry in entries if entry.lower().endswith((".dist-info", ".egg-info"))]
    return [*infos, f"{folder}{os.sep}EGG-INFO"] if folder.endswith(".egg") else infos


def installed_metadata() -> "list[str]":
    """Return the metadata folders or files in all folders of sys.path."""
    infos = []
    for folder in import_path():
        folder = folder or os.curdir
        try:
            infos += metadata_folders(folder, os.listdir(folder))
        except OSError:
            pass  # an archive, or not there
    return infos


def _folder_owners(folder: str, entries: "list[str]", groups: "list[list[str]]") -> "list[dict[str, str]]":
    """Return for each group of paths, relative to the folder, the owners' metadata folders and names."""
    found: list[dict[str, str]] = [{} for _ in groups]
    infos = metadata_folders(folder, entries)
    if not infos:
        return found
    # Where an image was stripped of sources, with bytecode in their place, RECORD lists the sources all the same.
    groups = [[*paths, *[path[:-1] for path in paths if path.endswith(".pyc")]] for paths in groups]
    wanted = [
        sorted([f"{path},".replace(os.sep, "/").encode("utf-8", "surrogatepass") for path in group]) for group in groups
    ]
    owners, unrecorded = [], []
    suspect = _line_start({path[:4] for paths in wanted for path in paths})
    bisect = standard("_bisect").bisect_left
    for info in infos:
        record = _read(f"{info}{os.sep}RECORD")
        if not record:
            unrecorded.append(info)
        elif suspect(record):
            try:
                lines = record_lines(record)
            except Exception as error:
                debug(f"cannot read {info}: {error!r}")
                continue
            hits = [_meet(lines, paths, bisect) for paths in wanted]
            if any(hits):
                owners.append(info)
                name = library_name(info)
                for hit, names in zip(hits, found):
                    if hit and name:
                        names[info] = name
    # Without RECORD the library's names decide: only where libraries get installed, since
    # elsewhere an egg-info is someone's source tree, and only for what no RECORD lists.
    if unrecorded and folder.endswith(("site-packages", "dist-packages", ".egg")):
        listed = {
            line.partition(b",")[0] + b"," for info in owners for line in record_lines(_read(f"{info}{os.sep}RECORD"))
        }
        for names, paths in zip(found, wanted):
            names |= _owners_by_name(
                unrecorded, [path[:-1].decode("utf-8", "replace") for path in paths if path not in listed]
            )
    return found


def _line_start(starts: "set[bytes]") -> "Callable[[bytes], object]":
    """Return a function that finds whether a line of a RECORD may begin with one of these four bytes, or a quote.

    By this most libraries are known not to matter. It is wrong about some that record_lines()
    rules out: to tell the four bytes apart one by one takes longer than that.
    """
    try:
        re = standard("re")
    except Exception:  # somebody's own re.py is loaded, or an enum.py with which re fails
        return lambda record: True
    ordered = sorted(starts)
    middle = len(ordered) // 2
    halves = [half for half in (ordered[:middle], ordered[middle:]) if half]
    classes = [b"".join(b"[%b]" % re.escape(bytes({*column})) for column in zip(*half)) for half in halves]
    search = re.compile(b"\n(?:%b)" % b"|".join([b'"', *classes])).search
    return lambda record: record[:4] in starts or record[:1] == b'"' or search(record)


def record_lines(record: bytes) -> "list[bytes]":
    """Return the sorted lines of a RECORD, each a path and a comma, then anything."""
    if b'"' in record or b"," not in record:  # never so as pip writes it
        rows = standard("csv").reader(record.decode("utf-8", "surrogateescape").splitlines())
        lines = [row[0].encode("utf-8", "surrogateescape") + b"," for row in rows if row and "," not in row[0]]
    else:
        lines = record.split(b"\n")
    lines.sort()
    return lines


def _meet(lines: "list[bytes]", wanted: "list[bytes]", bisect: "Callable[..., int]") -> bool:
    """Tell whether a wanted path, comma included, begins one of the lines; both are sorted.

    Each leaps to the other's next entry, so that a RECORD of ten thousand lines
    with nothing in common costs a few steps.
    """
    line = want = 0
    while want < len(wanted):
        line = bisect(lines, wanted[want], line)
        if line == len(lines):
            return False
        path = lines[line].partition(b",")[0] + b","
        if path == wanted[want]:
            return True
        want = bisect(wanted, path, want + 1)
    return False


def library_name(info: str) -> str:
    """Return the library's name from its metadata folder, "" if it has none or is editable.

    An editable install (PEP 610) is a person's own source tree.
    """
    direct_url = b"".join(_read(f"{info}{os.sep}direct_url.json").split())
    if b'"editable":true' in direct_url:
        return ""
    size = 1 << 12  # the name stands at the top
    metadata = _read(f"{info}{os.sep}METADATA", size) or _read(f"{info}{os.sep}PKG-INFO", size) or _read(info, size)
    for line in metadata.split(b"\n", 50):
        field, _, value = line.partition(b":")
        if field.strip().lower() == b"name":
            return normalized(value.decode("utf-8", "replace").strip())
        if not line.strip():
            break
    return ""


def normalized(name: str) -> str:
    """Return the name as PEP 503 normalises it, "" if it is not a valid one."""
    if not name.isascii():
        return ""
    words = name.lower().replace("_", "-").replace(".", "-").split("-")
    return "-".join(filter(None, words)) if "".join(words).isalnum() else ""


def _owners_by_name(infos: "list[str]", paths: "list[str]") -> "dict[str, str]":
    """Return the metadata folders and names of the owners of the paths among libraries that have no RECORD.

    top_level.txt says which modules they have; where that is missing too, their
    own name has to. Many libraries can share a top-level name (google, azure):
    then the one whose own name leads to the file owns it, google-auth what is
    in google/auth, and only where there is none all of them do.
    """
    claims: dict[str, list[tuple[str, set[str]]]] = {}  # names and their modules, by what a path can begin with
    names: dict[str, str] = {}
    for info in infos if paths else ():
        name = names[info] = library_name(info)
        tops = {
            top.partition("/")[0] for top in _read(f"{info}{os.sep}top_level.txt").decode("utf-8", "replace").split()
        }
        words = name.split("-")
        for begin in {_flat(top) for top in tops} or {"-".join(words[: count + 1]) for count in range(len(words))}:
            claims.setdefault(begin, []).append((name, tops))
    found: set[str] = set()
    unclear: dict[str, set[str]] = {}
    for path in paths:
        top = path.partition("/")[0].partition(".")[0]
        flat = _flat(path)
        mine = [(name, tops) for name, tops in claims.get(_flat(top), ()) if name and (not tops or top in tops)]
        own = {name for name, _ in mine if flat.startswith(name + "-")}
        longest = max(own, key=len, default="")
        if len(longest) > len(top):
            found.add(longest)
            continue
        own |= {name for name, tops in mine if tops}
        own = {name for name in own if f"-{name}-" in flat} or own  # protobuf is google/protobuf
        if len(own) == 1:
            found |= own
        else:
            unclear[path] = own
    by_dpkg = _owners_by_dpkg(unclear, names) if unclear else {}
    for path, own in unclear.items():
        owners = by_dpkg.get(path, set())
        found |= owners & own or own or owners
    return {info: name for info, name in names.items() if name in found}


def _flat(path: str) -> str:
    return path.lower().replace("_", "-").replace(".", "-").replace("/", "-")


def _owners_by_dpkg(paths: "Iterable[str]", names: "dict[str, str]") -> "dict[str, set[str]]":
    """Return the libraries that come in one package of Debian's with the path, by dpkg's own lists.

    Takes paths relative to a folder, and the names of the metadata folders in it.
    beautifulsoup4 has no top_level.txt and Debian drops its RECORD: nothing else
    leads to it from bs4.
    """
    database = "/var/lib/dpkg/info"
    owners: dict[str, set[str]] = {}
    try:
        packages = [entry for entry in os.listdir(database) if entry.startswith("python3-") and entry.endswith(".list")]
    except OSError:
        return owners  # not Debian
    start = os.path.dirname(next(iter(names))) + os.sep
    wanted = {start + path: path for path in paths}
    for package in packages:
        lines = set(_read(f"{database}/{package}").decode("utf-8", "replace").split("\n"))
        here = {name for info, name in names.items() if name and info in lines}
        if here:
            for file in wanted.keys() & lines:
                owners.setdefault(wanted[file], set()).update(here)
    return owners


def _archive_owners(archive: str, groups: "list[list[str]]") -> "list[dict[str, str]]":
    """Return for each group of paths, relative to the zip file, the owners' names, as _folder_owners() does."""
    metadata = standard("importlib.metadata")
    found: list[dict[str, str]] = [{} for _ in groups]
    for distribution in metadata.distributions(path=[archive]):
        try:
            name = normalized(distribution.metadata["Name"] or "")
            files = {str(distribution.locate_file(file)) for file in distribution.files or ()}
            tops = (distribution.read_text("top_level.txt") or name.replace("-", "_")).split()
        except Exception as error:
            debug(f"cannot read a library in {archive}: {error!r}")
            continue
        for names, paths in zip(found, groups):
            if archive.endswith(".egg") and not files:
                is_owner = any(path.partition(os.sep)[0].partition(".")[0] in tops for path in paths)
            else:
                is_owner = any(f"{archive}{os.sep}{path}" in files for path in paths)
            if name and is_owner:
                names[name] = name
    return found


def _virtual_owners(groups: "list[list[str]]") -> "list[set[str]]":
    """Answer libraries() for modules without a file, that a loader of somebody's own made."""
    found: list[set[str]] = [set() for _ in groups]
    tops = [{name.partition(".")[0] for name in group} for group in groups]
    for top in set().union(*tops) & sys.modules.keys():
        if top not in executed_files({top: sys.modules[top]}):
            for group in tops:
                group.discard(top)  # such as six.moves: six has a file, which decides
    if any(tops):
        metadata = standard("importlib.metadata")
        # What lies in a folder or an archive was asked already.
        listed = [library for library in metadata.distributions() if not isinstance(library, metadata.PathDistribution)]
        others = {normalized(library.metadata["Name"] or "") for library in listed} - {""}
        owners = metadata.packages_distributions() if others else {}
        for names, group in zip(found, tops):
            names |= {normalized(owner or "") for top in group for owner in owners.get(top, ())} & others
    return found


BLOCK = 1 << 14  # bytes


def _read(path: str, limit: int = 1 << 24) -> bytes:
    """Return what is in the file, nothing if it can't be read; a pipe or device never blocks."""
    try:
        descriptor = os.open(path, _READ)
    except OSError:
        return b""
    try:
        content = os.read(descriptor, min(limit, BLOCK))
        if len(content) == BLOCK:  # of few files; to ask all for their size takes longer
            os.lseek(descriptor, 0, os.SEEK_SET)
            content = os.read(descriptor, min(os.fstat(descriptor).st_size, limit))  # a device has no size
        return content
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def standard(name: str) -> "Any":
    """Import a module of the standard library, whatever a person's own folders hold.

    While it is imported, this thread finds top-level names of the standard library
    in no other place: somebody's csv.py in the working folder is never run by us.
    Raises ImportError if a module of somebody's own is loaded under the name.
    """
    if name not in sys.modules:

        class Finder:
            thread = _thread.get_ident()

            @classmethod
            def find_spec(cls, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
                if path is None and name in sys.stdlib_module_names and _thread.get_ident() == cls.thread:
                    return PathFinder.find_spec(name, [STDLIB, os.path.join(STDLIB, "lib-dynload")])
                return None

        sys.meta_path.insert(0, Finder)
        try:
            __import__(name)
        finally:
            sys.meta_path.remove(Finder)
    module = sys.modules[name]
    for file in executed_files({name: module}):
        raise ImportError(f"{name} is not the standard library's but {file}")
    return module


# ---- what a library requires ----------------------------------------------------


def required(
    names: "Iterable[str]",
    infos: "Mapping[str, Iterable[str]] | None" = None,
    others: "Mapping[str, Iterable[str]] | None" = None,
) -> "dict[str, set[str]]":
    """Map the names of libraries, and of all that they require here, transitively, to those that require them.

    Takes where the metadata of each library are, unless in the folders of sys.path, and what
    libraries require besides. Markers are evaluated (PEP 508); an extra counts only where
    a requirement asks for it.
    """
    re = standard("re")
    if infos is None:
        infos = {normalized(os.path.basename(info).partition("-")[0]): [info] for info in installed_metadata()[::-1]}
    found: dict[str, set[str]] = {name: set() for name in names}
    queue = [(name, "") for name in found]
    known = set(queue)
    for name, extra in queue:  # which grows
        pairs = [(other, "") for other in (others or {}).get(name, ())]
        for text in [text for info in infos.get(name, ()) for text in requirements(info)]:
            # Most are for extras. What is no alternative needs no evaluation.
            if "extra ==" not in text or extra or re.search(r"\bor\b", text):
                try:
                    pairs += requirement(text, extra)
                except ValueError as error:
                    debug(f"{name}: {error}")
                    pairs.append((normalized(re.match(r"[\w.-]*", text.strip())[0]), ""))
        for pair in pairs:
            if pair[0] != name:
                found.setdefault(pair[0], set()).add(name)
            if pair not in known:
                known.add(pair)
                queue.append(pair)
    return found


def metadata(info: str) -> "list[tuple[str, str]]":
    """Return the fields of the metadata (core metadata specification), names in lower case, without the description."""
    text = _read(f"{info}{os.sep}METADATA") or _read(f"{info}{os.sep}PKG-INFO") or _read(info)
    lines = text.replace(b"\r", b"").partition(b"\n\n")[0].decode("utf-8", "replace").split("\n")
    return [(field.lower(), value.strip()) for field, _, value in (line.partition(":") for line in lines)]


def requirements(info: str) -> "list[str]":
    """Return what the metadata require, as PEP 508 writes it; of an egg-info also from its requires.txt."""
    found = [value for field, value in metadata(info) if field == "requires-dist"]
    if not found:
        marker = ""
        for line in _read(f"{info}{os.sep}requires.txt").decode("utf-8", "replace").split("\n"):
            if line.startswith("["):  # [extra:marker], for the lines that follow
                extra, _, condition = line.strip("[] \r").partition(":")
                marker = " and ".join([f'extra == "{extra}"'] * bool(extra) + [f"({condition})"] * bool(condition))
            elif line.strip():
                found.append(f"{line.strip()}; {marker}" if marker else line.strip())
    return found


def requirement(text: str, extra: str = "") -> "list[tuple[str, str]]":
    """Return (name, "") and (name, extra) for each extra, of a requirement as PEP 508 writes it.

    Empty if its marker is false in this environment and with this extra. Raises ValueError.
    """
    re = standard("re")
    parts = re.match(r"\s*([\w.-]+)\s*(?:\[([^]]*)\])?(?:\s*@\s*\S+\s*|[^;]*)(?:;(.*))?$", text, re.ASCII)
    if not parts:
        raise ValueError(f"not a requirement: {text!r}")
    if parts[3] and not _Marker(parts[3], extra).holds:
        return []
    name = normalized(parts[1])
    return [
        (name, ""),
        *((name, normalized(wanted.strip())) for wanted in (parts[2] or "").split(",") if wanted.strip()),
    ]


class _Marker:
    """An environment marker (PEP 508), evaluated as it is read: `holds` is the result."""

    def __init__(self, text: str, extra: str) -> None:
        re = standard("re")
        self.extra = extra
        self.text = text
        self.tokens = re.findall(r"""\(|\)|"[^"]*"|'[^']*'|[<>=!~]=?=?|[\w.]+|\S""", text)[::-1]
        self.holds = self.either()
        if self.tokens:
            raise ValueError(f"not a marker: {text!r}")

    def take(self, *words: str) -> str:
        """Return the next token if it is one of the words, or any if none are given; else ""."""
        return self.tokens.pop() if self.tokens and (not words or self.tokens[-1] in words) else ""

    def either(self) -> bool:
        holds = self.both()
        while self.take("or"):
            holds = self.both() or holds
        return holds

    def both(self) -> bool:
        holds = self.one()
        while self.take("and"):
            holds = self.one() and holds
        return holds

    def one(self) -> bool:
        if self.take("("):
            holds = self.either()
            if not self.take(")"):
                raise ValueError(f"not a marker: {self.text!r}")
            return holds
        left, operator = self.take(), self.take()
        if operator == "not":
            operator += self.take("in")
        right = self.take()
        names = {left, right}
        return _compare(self.value(left), operator, self.value(right), "extra" in names)

    def value(self, token: str) -> str:
        if token[:1] in ("'", '"'):
            return token[1:-1]
        if token == "extra":
            return self.extra
        version = sys.implementation.version
        numbers = ".".join(map(str, sys.version_info[:3]))
        system = os.uname() if hasattr(os, "uname") else standard("platform").uname()
        level = {"final": "", "alpha": "a", "beta": "b", "candidate": "rc"}
        serial = (
            level[sys.version_info.releaselevel] and f"{level[sys.version_info.releaselevel]}{sys.version_info.serial}"
        )
        values = {
            "os_name": os.name,
            "sys_platform": sys.platform,
            "platform_machine": system.machine,
            "platform_python_implementation": {"cpython": "CPython", "pypy": "PyPy"}.get(sys.implementation.name, ""),
            "platform_release": system.release,
            "platform_system": getattr(system, "sysname", getattr(system, "system", "")),
            "platform_version": system.version,
            "python_version": "{}.{}".format(*sys.version_info),
            "python_full_version": numbers + serial,
            "implementation_name": sys.implementation.name,
            "implementation_version": f"{version.major}.{version.minor}.{version.micro}",
        }
        token = token.replace(".", "_")  # os.name and such are how it was written once
        if token == "python_implementation":
            token = "platform_python_implementation"
        if token not in values:
            raise ValueError(f"not a marker: {self.text!r}")
        return values[token]


def _compare(left: str, operator: str, right: str, is_extra: bool) -> bool:
    """Compare two values of a marker: as versions (PEP 440) if both are, else as text."""
    if is_extra:
        left, right = normalized(left), normalized(right)
    if operator in ("in", "notin"):
        return (left in right) == (operator == "in")
    one, other = _version(left), _version(right.removesuffix(".*"))
    if operator == "===" or one is None or other is None or is_extra:
        if operator not in ("==", "===", "!=", "<", "<=", ">", ">="):
            raise ValueError(f"not an operator: {operator!r}")
        order = (left > right) - (left < right)
    elif right.endswith(".*") or operator == "~=":
        release = other[0] if right.endswith(".*") else other[0][:-1]
        begins = (one[0] + (0,) * len(release))[: len(release)] == release
        return begins != (operator == "!=") and (operator != "~=" or one >= other)
    else:
        width = max(len(one[0]), len(other[0]))
        ours, theirs = ((v[0] + (0,) * (width - len(v[0])), v[1]) for v in (one, other))
        order = (ours > theirs) - (ours < theirs)
    return {
        "==": order == 0,
        "===": order == 0,
        "!=": order != 0,
        "<": order < 0,
        "<=": order <= 0,
        ">": order > 0,
        ">=": order >= 0,
    }[operator]


def _version(text: str) -> "tuple[tuple[int, ...], tuple[str, int]] | None":
    """Return a version's release, and where it stands before or after that; None if it is no version."""
    parts = standard("re").match(r"v?(\d+(?:\.\d+)*)[._-]?(dev|a|b|rc|post)?\.?(\d*)\+?$", text)
    if not parts:
        return None
    stage = parts[2] or "s"  # dev would sort after b: a space before it
    return tuple(map(int, parts[1].split("."))), (
        " dev" if stage == "dev" else "t" if stage == "post" else stage,
        int(parts[3] or 0),
    )


# ---- libraries -> statsd lines -> datagrams -> socket --------------------------

DATAGRAM = 1232  # bytes; the smallest IPv6 path, 1280, less the headers of IPv6 and UDP

NAME_SERVER_PORT = 53

PATIENCE = 1.0  # seconds that a name server, or another thread, may hold up a report


def _host(text: str) -> str:
    # Two colons at least are an IPv6 address; one is a port gone astray. No label of a name is empty, or longer (RFC 1035).
    labels = text.removesuffix(".").split(".") if text and ":" not in text else []
    if not _made_of(text, ".:%-_") or text.count(":") == 1 or not all(0 < len(label) < 64 for label in labels):
        raise ValueError("must be a name or an address, without a port: statsd.example, 10.0.0.3 or ::1")
    return text


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) < 65536 and len(text) < 6):
        raise ValueError("must be a whole number from 1 to 65535, such as 9125")
    return int(text)


def _prefix(text: str) -> str:
    if not _made_of(text, "_.-") or "" in text.split(".") or len(text) > 1000:
        raise ValueError(
            "must be words of A-Z a-z 0-9 _ - with dots between, 1000 at most, such as python_popcon.library_used"
        )
    return text


def _sample_rate(text: str) -> str:
    # The text itself goes on the wire: statsd servers do not read 1e-05.
    if not (text.isascii() and text.replace(".", "", 1).isdigit() and 0 < float(text) <= 1 and len(text) < 20):
        raise ValueError("must be a decimal number above 0 and not above 1, such as 0.1")
    return text


def _made_of(text: str, others: str) -> bool:
    return text.isascii() and (text.translate(dict.fromkeys(map(ord, others))) or "0").isalnum()


SETTINGS: "dict[str, tuple[str, Callable[[str], Any]]]" = {  # the default, and what reads a value
    "PYTHON_POPCONTEST_STATSD_HOST": ("", _host),
    "PYTHON_POPCONTEST_STATSD_PORT": ("9125", _port),
    "PYTHON_POPCONTEST_STATSD_PREFIX": ("python_popcon.library_used", _prefix),
    "PYTHON_POPCONTEST_STATSD_SAMPLE_RATE": ("1", _sample_rate),
}


def setting(name: str) -> "Any":
    """Return the value in force of one of SETTINGS; an empty variable is as good as none.

    Raises ValueError, saying what would be right.
    """
    default, read = SETTINGS[name]
    text = os.environ.get(name) or default
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: {error}") from None


def debugging() -> bool:
    """Tell whether PYTHON_POPCONTEST_DEBUG is set, and not 0."""
    return os.environ.get("PYTHON_POPCONTEST_DEBUG", "0") not in ("", "0")


def opted_out() -> bool:
    """Tell whether DO_NOT_TRACK is set, and not 0 (consoledonottrack.com)."""
    return os.environ.get("DO_NOT_TRACK", "0") != "0"


def debug(message: str) -> None:
    """Say it on stderr, in one line, if debugging() is asked for."""
    if debugging():
        try:
            sys.stderr.write("popcon: " + " ".join(message.split()) + "\n")
            sys.stderr.flush()
        except Exception:  # closed, None, or a person's own: then nobody is listening
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


def addresses(host: str, port: int) -> "list[tuple[int, Any]]":
    """Return (family, address) for the host, IPv4 first, after PATIENCE seconds at most.

    Raises OSError, and TimeoutError if a name server keeps silent. IPv4 first because statsd
    servers that listen on one family alone listen on that, and nobody answers when UDP takes
    the other way to localhost.
    """
    # What lies beneath socket: it needs no other module, and is still itself in
    # programs where gevent, PySocks or pytest-socket have replaced parts of socket.
    socket = standard("_socket")

    def look_up(flags: int) -> "list[tuple[int, Any]]":
        # As bytes, since of a str it looks for the idna codec in files that a person may have taken away.
        found = socket.getaddrinfo(host.encode("ascii"), port, socket.AF_UNSPEC, socket.SOCK_DGRAM, 0, flags)
        return sorted(
            ((family, address) for family, _, _, _, address in found), key=lambda pair: pair[0] != socket.AF_INET
        )

    try:
        return look_up(socket.AI_NUMERICHOST)
    except OSError:
        pass  # a name
    if host.encode() in _read("/etc/hosts").split():
        return look_up(0)
    # A look-up can't be interrupted. So ask the name server by hand first: when it is silent, no
    # thread lingers, of which os.fork() would warn. And 3.12 starts none at exit.
    clock = standard("time").monotonic
    start = clock()
    silence = TimeoutError(f"the name server did not answer within {PATIENCE:g} s")
    if not _name_server_answers(host):
        raise silence
    results: list[Any] = []
    done = _thread.allocate_lock()

    def work() -> None:
        try:
            results.append(look_up(0))
        except Exception as error:
            results.append(error)
        done.release()

    done.acquire()
    handle: Any = None
    try:
        # From 3.13 on it can be joined: of a thread that is about to end os.fork() would warn, too.
        begin = getattr(_thread, "start_joinable_thread", None)
        handle = begin(work) if begin else _thread.start_new_thread(work, ())
    except RuntimeError:
        work()
    if not done.acquire(timeout=max(0.0, start + PATIENCE - clock())):
        raise silence
    if hasattr(handle, "join"):
        handle.join()
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]  # type: ignore[no-any-return]


def _name_server_answers(host: str) -> bool:
    """Tell whether a look-up will not hang, by asking the first name server by hand (RFC 1035)."""
    lines = [line.split() for line in _read("/etc/resolv.conf").splitlines()]
    servers = [words[1] for words in lines if len(words) > 1 and words[0] == b"nameserver"]
    if not servers:
        return True  # not a system that is set up so
    name, dots = host.encode(), 1
    search: list[bytes] = []
    for words in lines:
        if words[:1] in ([b"search"], [b"domain"]):
            search = words[1:]
        for word in words[1:] if words[:1] == [b"options"] else ():
            if word.startswith(b"ndots:") and word[6:].isdigit():
                dots = int(word[6:])
    # What the look-up asks first: in a cluster nobody may be there to tell of the name as it is.
    if search and name.count(b".") < dots and not name.endswith(b"."):
        name += b"." + search[0]
    labels = b"".join(bytes([len(label)]) + label for label in name.strip(b".").split(b".") if 0 < len(label) < 64)
    query = os.urandom(2) + b"\1\0\0\1\0\0\0\0\0\0" + labels + b"\0\0\1\0\1"
    socket = standard("_socket")
    numeric = socket.AI_NUMERICHOST
    try:
        family, _, _, _, address = socket.getaddrinfo(servers[0], NAME_SERVER_PORT, 0, socket.SOCK_DGRAM, 0, numeric)[0]
        probe(family, address, query, PATIENCE)
    except TimeoutError:
        return False
    except OSError:
        pass  # refused at once, as the look-up will be
    return True


def probe(family: int, address: "Any", query: bytes, patience: float) -> None:
    """Send a datagram, and wait for an answer. Raises TimeoutError, or OSError if it is refused."""
    socket = standard("_socket")
    prober = socket.socket(family, socket.SOCK_DGRAM)
    try:
        prober.settimeout(patience)
        prober.connect(address)
        prober.send(query)
        prober.recv(1)
    finally:
        prober.close()


def send(packets: "list[bytes]", host: str, port: int) -> None:
    """Send the datagrams to the first of the host's addresses that takes them. Raises OSError."""
    socket = standard("_socket")
    packets = packets[::-1]
    failure: OSError | None = None
    for family, address in addresses(host, port):
        try:
            sender = socket.socket(family, socket.SOCK_DGRAM)
            try:
                sender.settimeout(PATIENCE)
                while packets:
                    sender.sendto(packets[-1], address)
                    packets.pop()
                return
            finally:
                sender.close()
        except OSError as error:
            failure = error
    raise failure or OSError("the name has no address")


# ---- the state ------------------------------------------------------------------


class Reporter:
    """What one process has loaded, used and sent.

    `baseline` and `seen` are files, `used` and `sent` the names of libraries. Every
    file is in one of the first two as soon as its owner is known.
    """

    def __init__(self) -> None:
        self.lock = _thread.allocate_lock()
        self.baseline: dict[str, str] = {}
        self.baseline_libraries: set[str] | None = set()
        self.in_shell = False
        self.seen: dict[str, str] = {}
        self.used: set[str] = set()
        self.sent: set[str] = set()
        self.drawn: bool | None = None
        self.silent_until = 0.0  # when a name server that kept silent may be asked again
        self.last: tuple[int, object] = (0, None)

    def take_baseline(self) -> None:
        """Start over: what is loaded now is the baseline. What was sent stays sent."""
        self.baseline = executed_files(dict(sys.modules))
        self.baseline_libraries = None  # looked up when something is compared with it
        self.in_shell = ipython_shell() is not None
        self.seen, self.used = {}, set()
        self.last = self.newest()

    def newest(self) -> "tuple[int, object]":
        """Return what changes when a module is loaded."""
        return len(sys.modules), next(reversed(sys.modules), None)

    def after_fork(self) -> None:
        """Begin anew as the child: what the parent loaded is the parent's."""
        try:
            self.__init__()  # type: ignore[misc]
            self.take_baseline()
            _report_at_worker_exit()
        except Exception as error:
            debug(f"no baseline after fork: {error!r}")

    def update(self) -> None:
        """Find the owners of what was loaded since the last time."""
        new = executed_files(dict(sys.modules))
        for file in self.baseline.keys() | self.seen.keys():
            new.pop(file, None)
        if new:
            if self.baseline_libraries is None:
                found, self.baseline_libraries = libraries(new, self.baseline)
                if self.in_shell:  # what it loads later, for a traceback or a completion, is the shell's own
                    self.baseline_libraries |= required(["ipython", "ipykernel"]).keys()
            else:
                (found,) = libraries(new)
            self.used |= found - self.baseline_libraries
            new.update(self.seen)
            self.seen = new

    def report(self, last_chance: bool = False) -> "list[str]":
        """Send what was used and not sent yet, and return it. Raises OSError or ValueError."""
        if opted_out():
            if not last_chance:
                self.take_baseline()  # what was loaded under it is not sent later either
            debug("nothing sent: DO_NOT_TRACK is set")
            return []
        host, port, prefix, rate = map(setting, SETTINGS)
        if not host:
            debug("nothing sent: PYTHON_POPCONTEST_STATSD_HOST is not set")
            return []
        if self.drawn is None:
            self.drawn = int.from_bytes(os.urandom(6), "big") < float(rate) * 2**48
        if not self.drawn:
            debug(f"nothing sent: this process is not in the sample of {rate}")
            return []
        self.update()
        names = sorted(self.used - self.sent)
        lines = [statsd_line(name, prefix, rate) for name in names]
        if not names:
            debug("nothing sent: no library was used" + (" since the last report" if self.sent else ""))
            return []
        clock = standard("time").monotonic
        if clock() < self.silent_until and not last_chance:
            raise OSError("the name server did not answer a while ago")
        try:
            send(datagrams(lines), host, port)
        except OSError as error:
            if isinstance(error, TimeoutError):
                self.silent_until = clock() + 600
            raise OSError(f"{host}: {error}") from None
        self.sent.update(names)
        for line in lines if debugging() else ():
            debug(f"sent {line.decode()} to {host}:{port}")
        return names


def ipython_shell() -> "Any":
    """Return the IPython shell that this process runs, None if it runs none; imports nothing."""
    module = sys.modules.get("IPython.core.interactiveshell")
    shell = _module_namespace(module).get("InteractiveShell") if type(module) is type(sys) else None
    return shell.instance() if shell is not None and shell.initialized() else None


_reporter = Reporter()
_is_set_up = False


def setup_reporter() -> None:
    """Take the baseline; report at exit, and in IPython after each cell, what is used beyond it.

    What is loaded by now never counts. A later call moves the baseline. Never
    raises, prints nothing, and takes less than a millisecond.
    """
    global _is_set_up
    try:
        _reporter.take_baseline()
        if not _is_set_up:
            atexit.register(_report_at_exit)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=_reporter.after_fork)
            _report_at_worker_exit()
            _is_set_up = True
        shell = ipython_shell()
        if shell is not None and _report_after_cell not in shell.events.callbacks["post_execute"]:
            shell.events.register("post_execute", _report_after_cell)
    except Exception as error:
        debug(f"not set up: {error!r}")


def used_libraries() -> "set[str]":
    """Return the names of the libraries used since the baseline, sent or not.

    Without setup_reporter() the baseline is empty: all that is loaded counts.
    """
    _reporter.update()
    return set(_reporter.used)


def report() -> "list[str]":
    """Send now what was not sent yet, and return the names that were sent.

    For a server that never exits, or a hook of one's own. Every library is sent once
    by a process. Never raises: what went wrong is told by PYTHON_POPCONTEST_DEBUG,
    and what could not be sent is tried again the next time.
    """
    return _report()


def _report(last_chance: bool = False) -> "list[str]":
    if not _reporter.lock.acquire(timeout=PATIENCE):
        return []  # another thread is at it
    try:
        return _reporter.report(last_chance)
    except Exception as error:
        debug(f"nothing sent: {error if isinstance(error, (OSError, ValueError)) else repr(error)}")
        return []
    finally:
        _reporter.lock.release()


def _report_at_exit() -> None:
    try:
        _report(last_chance=True)
    except BaseException:  # Ctrl-C, say: the process is ending already
        debug("stopped")


def _report_at_worker_exit() -> None:
    """Report at the end of a multiprocessing worker, which leaves by os._exit(), but runs its finalizers before.

    They are to be made after a fork: a worker begins by dropping those of its parent.
    """
    util = sys.modules.get("multiprocessing.util")
    if util:
        util.register_after_fork(_reporter, lambda _: util.Finalize(None, _report_at_exit, exitpriority=-100))


def _report_after_cell() -> None:
    """Report what a cell has loaded: a kernel that gets killed does not run _report_at_exit()."""
    try:
        newest = _reporter.newest()
        if newest != _reporter.last:
            _reporter.last = newest
            _report()
    except BaseException:  # IPython would show it, Ctrl-C too
        debug("stopped")


# ---- the command line ---------------------------------------------------------------


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run the command line, and return the exit status; wrong usage exits with 2."""
    load_command_line()
    status: int = globals()["run_command_line"](arguments)
    return status


def load_command_line() -> None:
    """Make what _command_line() holds a part of this module.

    Every start of Python loads the bytecode of this file, and would pay for the command line, which few
    processes run. The compiler knows __debug__, and leaves out of the bytecode what stands after
    a return. So it is compiled here, from the source, for those who run it.
    """
    if "selftest" not in globals():
        ast = standard("ast")
        tree = ast.parse("".join(standard("linecache").getlines(__file__, globals())))
        (function,) = (node for node in tree.body if getattr(node, "name", "") == "_command_line")
        tree.body = function.body[2:]
        exec(compile(tree, __file__, "exec"), globals())


def _command_line() -> None:
    """All that the command line is made of; load_command_line() takes it out of here."""
    if __debug__:
        return

    # What a child of selftest runs: the library's folder and this very file are its arguments.
    CHILD = """\
import sys, time
sys.path.insert(0, sys.argv[1])
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("popcon", sys.argv[2])
popcon = sys.modules["popcon"] = module_from_spec(spec)
start = time.perf_counter()
spec.loader.exec_module(popcon)
popcon.setup_reporter()
print((time.perf_counter() - start) * 1e3)
import popcon_selftest
"""

    def selftest() -> int:
        """Prove the whole way from an import to a datagram, and print what is in force.

        Returns 0, or 1 if something is an error. Needs no server, leaves nothing behind.
        """
        worst = 0
        checks = [_check_python, _check_way, _check_bytecode, _check_activation]
        checks += [_check_settings, _check_server, _check_libraries, _check_cost]
        for check in checks:
            lines = []
            try:
                for line in check():
                    lines.append(line)
            except Exception as error:
                lines.append(("error", check.__name__[7:], f"{type(error).__name__}: {error}"))
            for state, what, text in lines:
                print(f"{state:9}{what:13}{text}", flush=True)
                worst |= state == "error"
        return worst

    def _check_python() -> "Iterator[tuple[str, str, str]]":
        yield "ok", "popcon", f"{__version__}, {os.path.abspath(__file__)}"
        yield "ok", "python", f"{sys.version.split()[0]}, environment {sys.prefix}"

    def _trial(program: "Callable[[str], list[str]]") -> "tuple[Any, bytes]":
        """Run a child that imports a throw-away library, and return how it ended and what it reported.

        Takes what makes the interpreter's arguments of the library's folder. The child
        reports to a receiver on the loopback interface, with no other setting.
        """
        info = "popcon_selftest-1.dist-info/"
        library = {
            "popcon_selftest/__init__.py": "",
            info + "METADATA": "Metadata-Version: 2.1\nName: popcon_selftest\nVersion: 1\n",
            info + "RECORD": f"popcon_selftest/__init__.py,,\n{info}METADATA,,\n{info}RECORD,,\n",
        }
        socket, tempfile = standard("_socket"), standard("tempfile")
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            receiver.bind(("127.0.0.1", 0))
            receiver.settimeout(0.5)  # the loopback interface delivers before the child has ended
            environ = {
                name: value
                for name, value in os.environ.items()
                if name != "DO_NOT_TRACK" and not name.startswith("PYTHON_POPCONTEST")
            }
            environ["PYTHON_POPCONTEST_STATSD_HOST"] = "127.0.0.1"
            environ["PYTHON_POPCONTEST_STATSD_PORT"] = str(receiver.getsockname()[1])
            try:
                with tempfile.TemporaryDirectory(prefix="popcon-") as folder:
                    for path, text in library.items():
                        os.makedirs(os.path.dirname(os.path.join(folder, path)), exist_ok=True)
                        with open(os.path.join(folder, path), "w", encoding="utf-8") as file:
                            file.write(text)
                    environ["IPYTHONDIR"] = os.path.join(folder, "ipython")
                    child = _run_child(program(folder), environ, folder)
            except OSError as error:
                if not hasattr(os, "memfd_create"):
                    raise OSError(f"no place for a throw-away library: {error}") from None
                # Nothing here can be written: a zip file in memory serves as well.
                with open(os.memfd_create("popcon"), "w+b") as memory:
                    with standard("zipfile").ZipFile(memory, "w") as archive:
                        for path, text in library.items():
                            archive.writestr(path, text)
                    memory.flush()
                    child = _run_child(program(f"/proc/self/fd/{memory.fileno()}"), environ, "/", (memory.fileno(),))
            try:
                return child, receiver.recv(65536)
            except OSError:
                return child, b""
        finally:
            receiver.close()

    def _run_child(
        arguments: "list[str]", environ: "dict[str, str]", folder: str, descriptors: "tuple[int, ...]" = ()
    ) -> "Any":
        """Run this interpreter as it was run, with other arguments, and return what subprocess.run() returns."""
        if not sys.executable:
            raise OSError("this Python does not know its own executable")
        flags = (
            ["-B"]
            + ["-I"] * sys.flags.isolated
            + ["-S"] * sys.flags.no_site
            + [f"-W{option}" for option in sys.warnoptions]
        )
        return standard("subprocess").run(
            [sys.executable, *flags, *arguments],
            env=environ,
            cwd=folder,
            pass_fds=descriptors,
            stdin=-3,
            stdout=-1,
            stderr=-1,
            timeout=60,
        )  # -3 is DEVNULL, -1 is PIPE

    def _check_way() -> "Iterator[tuple[str, str, str]]":
        """Import a throw-away library in a child, and receive what the child reports."""
        expected = b"python_popcon.library_used.popcon-selftest:1|c"
        child, received = _trial(lambda library: ["-c", CHILD, library, os.path.abspath(__file__)])
        if child.returncode or child.stderr:
            said = child.stderr.decode(errors="replace").strip()
            yield "error", "reporting", f"the child ended with status {child.returncode} and said {said!r}"
            return
        if received == expected:
            yield "ok", "reporting", f"a process imported a library, and sent {received.decode()}"
        elif received:
            yield "error", "reporting", f"the child sent {received!r} instead of {expected!r}"
        else:
            yield "error", "reporting", "the child reported nothing; a firewall on the loopback interface?"
        compiling = "" if is_compiled(__file__) else ", most of it to compile popcon.py"
        yield "ok", "start-up", f"{float(child.stdout):.1f} ms{compiling}"

    def _check_bytecode() -> "Iterator[tuple[str, str, str]]":
        """See that Python need not compile the file that processes here import, each time anew."""
        path = imported_popcon()
        if not path:
            yield (
                "warning",
                "import",
                f"Python does not import popcon from {os.path.dirname(os.path.abspath(__file__))} when it runs elsewhere; "
                "`install --vendor` puts it where it is found",
            )
            return
        state, text = "ok", standard("importlib.util").cache_from_source(path)
        if not is_compiled(path):
            try:
                standard("py_compile").compile(path, doraise=True)
            except Exception as error:
                state, text = "warning", f"every start compiles {path} anew, which takes longer than all else: {error}"
        yield state, "bytecode", text

    def is_compiled(source: str) -> bool:
        """Tell whether the bytecode of the file is there, and made of the file as it is (PEP 552)."""
        util = standard("importlib.util")
        header, stat = _read(util.cache_from_source(source), 16), os.stat(source)
        stamp = b"".join((int(number) & 0xFFFFFFFF).to_bytes(4, "little") for number in (stat.st_mtime, stat.st_size))
        # With a flag it goes by a hash of the file instead: somebody has seen to it.
        return header[:4] == util.MAGIC_NUMBER and (any(header[4:8]) or header[8:] == stamp)

    def _check_activation() -> "Iterator[tuple[str, str, str]]":
        """Try out what is switched on here, and look for what was left over."""
        code = "import sys; sys.path.insert(0, {!r}); import popcon_selftest"
        _, received = _trial(lambda library: ["-c", code.format(library)])
        yield (
            "ok",
            "processes",
            "each reports" if received else "do not report by themselves; `install --all-processes` lets each",
        )
        has_ipython = standard("importlib.util").find_spec("IPython") is not None
        if has_ipython:
            child, received = _trial(
                lambda library: ["-m", "IPython", "--no-banner", "--quick", "-c", code.format(library)]
            )
            lost = "" if not child.returncode else f" (IPython ended with status {child.returncode})"
            yield (
                ("ok", "IPython", "each session reports")
                if received
                else ("warning", "IPython", f"does not report; `install` lets each session{lost}")
            )
        everywhere = [list(activation_files(version))[1] for version in ((3, 17), (3, 18))]
        site = [path for path in everywhere if os.path.exists(path)]
        startups = []
        for prefix in dict.fromkeys((os.path.join(sys.prefix, "etc"), "/usr/local/etc", "/etc")):
            folder = os.path.join(prefix, "ipython", "startup")
            try:
                startups += [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".py")]
            except OSError:
                pass  # not there
        ours = [path for path in startups if b"import popcon" in _read(path)]
        for double in (site, ours):
            if len(double) > 1:
                yield "warning", "left over", f"one of these is enough: {', '.join(double)}"
        if (site or ours) and not imported_popcon():
            yield "warning", "left over", f"popcon itself is gone, but not {', '.join([*site, *ours])}"
        for path in filter(os.path.exists, journals()):
            yield "warning", "left over", f"an install was cut short, `uninstall` removes what it wrote: see {path}"
        for path in startups:
            if b"popularity_contest" in _read(path):
                yield "warning", "left over", f"{path} counts with popularity-contest, too"

    def _check_settings() -> "Iterator[tuple[str, str, str]]":
        for name in SETTINGS:
            what = name.rpartition("STATSD_")[2].lower().replace("_", " ")
            try:
                value = setting(name)
            except ValueError as error:
                yield "error", what, f"{error}; nothing is sent"
                continue
            if value:
                yield "ok", what, f"{value}" + ("" if os.environ.get(name) else f", the default; {name} is not set")
            else:
                yield "warning", what, f"{name} is not set: nothing is sent"
        if "DO_NOT_TRACK" in os.environ:
            state = "warning" if opted_out() else "ok"
            yield (
                state,
                "do not track",
                f"DO_NOT_TRACK={os.environ['DO_NOT_TRACK']}" + (": nothing is sent" if state == "warning" else ""),
            )
        if debugging():
            yield "ok", "debug", "PYTHON_POPCONTEST_DEBUG is set: every process says what it sends"
        for name in sorted(os.environ):
            if name.startswith("PYTHON_POPCONTEST") and name not in {*SETTINGS, "PYTHON_POPCONTEST_DEBUG", HEADER}:
                yield "warning", "unknown", f"{name} is no setting of popcon"

    def _check_server() -> "Iterator[tuple[str, str, str]]":
        """Look whether a server listens, with an empty datagram, which adds to no counter."""
        try:
            host, port = setting("PYTHON_POPCONTEST_STATSD_HOST"), setting("PYTHON_POPCONTEST_STATSD_PORT")
        except ValueError:
            return  # told by _check_settings()
        if not host:
            return
        try:
            family, address = addresses(host, port)[0]
        except OSError as error:
            yield "error", "server", f"{host} leads to no address: {error}"
            return
        where = f"{host} is {address[0]}, " if host != address[0] else ""
        try:
            probe(family, address, b"", 0.5)
        except TimeoutError:
            yield "ok", "server", f"{where}port {port} does not refuse (more can't be known of UDP)"
        except ConnectionRefusedError:
            yield "error", "server", f"{where}nothing listens on UDP port {port} there"
        except OSError as error:
            yield "error", "server", f"{where}not reached: {error}"

    def _check_libraries() -> "Iterator[tuple[str, str, str]]":
        """Count what is installed on sys.path, and what of it could ever be counted."""
        suffixes = tuple(suffix.encode() for suffix in standard("importlib.machinery").all_suffixes())
        names, matched, broken = set(), set(), []
        modules: dict[str, list[str]] = {}  # of a folder where a RECORD is missing
        for info in dict.fromkeys(installed_metadata()):
            folder = os.path.dirname(info)
            try:
                name, lines = library_name(info), record_lines(_read(f"{info}{os.sep}RECORD"))
            except Exception as error:
                broken.append(f"{info} ({error})")
                continue
            paths = (line.partition(b",")[0] for line in lines)
            if not name:
                if not _read(f"{info}{os.sep}direct_url.json") and (lines or folder.endswith("-packages")):
                    broken.append(f"{info} (no valid name)")
                continue
            names.add(name)
            if any(path.endswith(suffixes) and not path.startswith((b"..", b"/")) for path in paths):
                matched.add(name)
            elif not lines and os.path.basename(folder) in ("site-packages", "dist-packages"):
                for entry in os.listdir(folder) if folder not in modules else ():
                    package = "/__init__.py" if os.path.isdir(os.path.join(folder, entry)) else ""
                    modules.setdefault(folder, []).extend([entry + package] * (not metadata_folders(folder, [entry])))
                inner = [f"{name.replace('-', os.sep)}/__init__.py"]  # google/auth
                inner *= os.path.exists(os.path.join(folder, *inner))
                matched.update(_owners_by_name([info], modules[folder] + inner).values())
        rest = sorted(names - matched)
        yield (
            "ok",
            "libraries",
            f"{len(names)} installed, {len(matched & names)} can be matched to modules"
            + (f"; not {', '.join(rest[:8])}{' and others' if rest[8:] else ''}" if rest else ""),
        )
        for text in broken:
            yield "warning", "metadata", f"cannot be read, never counted: {text}"

    def _check_cost() -> "Iterator[tuple[str, str, str]]":
        """Time the search for the owner of a module in each folder of sys.path."""
        clock = standard("time").perf_counter
        files = {
            os.path.join(folder, "popcon_selftest.py"): "popcon_selftest"
            for folder in import_path()
            if os.path.isdir(folder)
        }
        start = clock()
        libraries(executed_files(dict(sys.modules)) | files)
        yield "ok", "exit", f"{(clock() - start) * 1e3:.1f} ms for a process that used a library"

    # What the activation files say of themselves: by it install and uninstall know their own.
    MARK = "# popcon counts which installed libraries are used, and nothing about who uses them."
    REMOVE = "# `python -m popcon uninstall` removes this file, and what else was made with it:"
    MADE = "#     "

    STARTUP = """\
def _popcon():
    from importlib.util import find_spec
    with open(find_spec("popcon").origin, "rb") as file:
        if b"which installed libraries do people really use" in file.read():  # not a person's own popcon.py
            import popcon
            popcon.setup_reporter()
try:
    _popcon()
except Exception:  # popcon.py is gone, or half copied: nobody should notice
    pass
del _popcon
"""

    # In a .pth file only a line that begins with import is run.
    PTH = """import sys; exec("try: import popcon; popcon.setup_reporter()\\nexcept Exception: pass")\n"""

    def activation_files(version: "tuple[int, ...]" = sys.version_info[:2]) -> "dict[str, str]":
        """Map the paths of the activation files of this environment to what they run; the first is IPython's.

        From Python 3.18 on, import lines in .pth files are ignored, and .start files
        (PEP 829) are read instead; up to 3.17 such a file is not silent when popcon is gone.
        """
        site = standard("sysconfig").get_path("purelib")
        everywhere = {"popcon.start": "popcon:setup_reporter\n"} if version >= (3, 18) else {"popcon.pth": PTH}
        return {os.path.join(sys.prefix, "etc", "ipython", "startup", "000-popcon.py"): STARTUP} | {
            os.path.join(site, name): text for name, text in everywhere.items()
        }

    def made_by_install(path: str) -> "list[str] | None":
        """Return the paths that an activation file lists as made with it, None if popcon did not write the file.

        They are listed relative to sys.prefix, for an environment may be copied or moved.
        """
        lines = os.fsdecode(_read(path)).split("\n")
        if lines[:1] != [MARK]:
            return None
        return [
            os.path.normpath(os.path.join(sys.prefix, line[len(MADE) :])) for line in lines if line.startswith(MADE)
        ]

    def listing(made: "Iterable[str]") -> bytes:
        """Return what made_by_install() reads."""
        return os.fsencode("\n".join([MARK, REMOVE, *(MADE + os.path.relpath(path, sys.prefix) for path in made), ""]))

    def journals() -> "list[str]":
        """Return where install() may list what it is about to make, while it does: in a folder that was there before."""
        parts = ("etc", "ipython", "startup")
        return [os.path.join(sys.prefix, *parts[:depth], "popcon-install.unfinished") for depth in range(4)]

    def install(
        all_processes: bool = False, vendor: bool = False, version: "tuple[int, ...]" = sys.version_info[:2]
    ) -> int:
        """Let every IPython session of this environment report, or every process; print what is written.

        Returns the exit status. Raises SystemExit with a sentence if it can't be done, and
        leaves nothing half done; what it leaves if it is killed, the next one removes.
        """
        files = activation_files(version)
        startup = next(iter(files))
        if not all_processes:
            files = {startup: STARTUP}
        for path in files:
            if len(path.splitlines()) > 1:
                raise SystemExit(f"popcon: {path!r} has a newline in it; nothing was changed")
            if os.path.lexists(path) and made_by_install(path) is None:
                raise SystemExit(
                    f"popcon: {path} was not written by popcon, and is left as it is; nothing was changed. Move it away first"
                )
        clean_up()
        here = os.path.abspath(__file__)
        library = os.path.join(standard("sysconfig").get_path("purelib"), "popcon.py")
        imported = imported_popcon()
        if imported and _read(imported) != _read(here):
            raise SystemExit(
                f"popcon: Python imports another copy of popcon here, {imported}; nothing was changed. "
                "Use that one, `python -m popcon install`, or remove it first, with `python -m popcon uninstall` of its own environment if that wrote it"
            )
        if not imported and not vendor:
            raise SystemExit(
                f"popcon: Python does not import popcon from {os.path.dirname(here)} when it runs elsewhere; nothing was "
                f"changed. Put popcon.py into {os.path.dirname(library)}, or let `install --vendor` do it"
            )
        source = imported or library
        compiled = standard("importlib.util").cache_from_source(source)
        is_complete = bool(imported) and all(map(os.path.exists, files))
        if is_complete and (is_compiled(source) or not os.path.exists(compiled)):
            print(f"nothing to do: {' and '.join(files)} {'are' if all_processes else 'is'} there")
            return 0
        # Each lists all that was made with any, so that one may get lost.
        listed = [other for path in files for other in made_by_install(path) or ()]
        if not imported and os.path.lexists(library) and library not in listed:
            raise SystemExit(f"popcon: Python fails to import {library}, which is left as it is; nothing was changed")
        made = sorted({path for wanted in (source, compiled, *files) for path in missing(wanted)})
        lines = []
        journal = [path for path in journals() if os.path.isdir(os.path.dirname(path))][-1]
        try:
            write(journal, listing(made))
            if not imported:
                write(library, _read(here))
                lines.append(f"wrote {library}")
            if not is_compiled(source):
                try:
                    make_folder(os.path.dirname(compiled))
                    standard("py_compile").compile(source, doraise=True)
                    os.chmod(compiled, os.stat(source).st_mode & 0o666)
                    lines.append(f"wrote {compiled}")
                except OSError as error:
                    lines.append(f"warning: every start will compile {source} anew: {error}")
            for path in files:
                make_folder(os.path.dirname(path))
            head = listing(dict.fromkeys(listed + [path for path in made if os.path.exists(path)]))
            for path in sorted(files, key=os.path.exists):  # those that can be undone first
                content = head + files[path].encode()
                if _read(path) != content:
                    write(path, content)
                    lines.append(f"wrote {path}")
        except (OSError, KeyboardInterrupt) as error:
            remove(made)
            remove([journal])
            if isinstance(error, KeyboardInterrupt):
                raise
            where = os.path.dirname(error.filename)
            raise SystemExit(f"popcon: cannot write into {where}: {error.strerror}; nothing was changed") from None
        os.remove(journal)
        print(*lines, sep="\n")  # at last, for who reads it may be gone
        return 0

    def imported_popcon() -> str:
        """Return from which file a process of this environment, run in any folder, imports popcon; "" if from none."""
        # From the root, for sys.path may hold the working folder, and without it; others may print at start-up.
        code = (
            "import os, sys; sys.path[:] = [entry for entry in sys.path if entry not in ('', os.getcwd())]; import popcon; "
            "sys.stdout.buffer.write(bytes(1) + os.fsencode(os.path.abspath(popcon.__file__)) + bytes(1))"
        )
        command = [sys.executable, "-B", "-c", code]
        run = standard("subprocess").run
        child = run(command, cwd=os.path.abspath(os.sep), stdin=-3, stdout=-1, stderr=-3, timeout=60)
        return os.fsdecode((child.stdout + b"\0\0").split(b"\0")[1])

    def one_at_a_time(change: "Callable[[], int]") -> int:
        """Call install() or uninstall(), and return its status, when no other one is at work in this environment."""
        try:
            fcntl, folder = standard("fcntl"), os.open(sys.prefix, os.O_RDONLY)
            fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed
        except (ImportError, OSError):  # not POSIX, or a file system without locks
            return change()
        try:
            return change()
        finally:
            os.close(folder)

    def missing(path: str) -> "list[str]":
        """Return the path and the folders above it, the highest first, as far as they are not there."""
        return [] if os.path.lexists(path) else [*missing(os.path.dirname(path)), path]

    def make_folder(path: str) -> None:
        """Make a folder and those above it, as far as they are not there. Raises OSError.

        Whoever may look into the folder above may look into it, whatever the umask says: those who use the environment.
        """
        for folder in missing(path):
            os.mkdir(folder)
            os.chmod(folder, os.stat(os.path.dirname(folder)).st_mode & 0o7777)

    def write(path: str, content: bytes) -> None:
        """Let a file appear whole, in place of what was there, readable for whoever may look into its folder.

        Raises OSError.
        """
        make_folder(os.path.dirname(path))
        unfinished = f"{path}.{os.getpid()}"
        try:
            with open(unfinished, "wb") as file:
                file.write(content)
            os.chmod(unfinished, os.stat(os.path.dirname(path)).st_mode & 0o666)
            os.replace(unfinished, path)
        except OSError as error:
            remove([unfinished])
            error.filename = path
            raise

    def remove(paths: "Iterable[str]") -> "list[str]":
        """Remove files, then folders that are empty by then; return what is gone. Raises SystemExit with a sentence.

        With popcon.py goes its bytecode, and with each file what a write that was cut short left beside it.
        """
        glob = standard("glob")
        files, places, gone = [], set(), []
        for path in paths:
            if os.path.isdir(path) and not os.path.islink(path):
                places.add(path)
                continue
            if os.path.basename(path) == "popcon.py":
                cache = os.path.join(os.path.dirname(path), "__pycache__")
                files += glob.glob(os.path.join(glob.escape(cache), "popcon.*.pyc*"))
            beside = glob.glob(glob.escape(path) + ".*")
            files += [*(other for other in beside if other[len(path) + 1 :].isdigit()), path]
        try:
            for path in dict.fromkeys(files):
                if os.path.lexists(path):
                    os.remove(path)
                    gone.append(path)
            for path in sorted(places, key=len, reverse=True):
                if os.path.isdir(path) and not os.listdir(path):  # else somebody else uses it by now
                    os.rmdir(path)
                    gone.append(path)
        except OSError as error:
            raise SystemExit(f"popcon: {error.filename} cannot be removed: {error.strerror}") from None
        return gone

    def unclaimed(made: "list[str]") -> "list[str]":
        """Return the paths without those that are somebody else's by now: an activation file, popcon.py and its bytecode."""
        activating = activation_files((3, 17)) | activation_files((3, 18))
        foreign = {
            path for path in made if path in activating and os.path.lexists(path) and made_by_install(path) is None
        }
        library = [path for path in made if os.path.basename(path) == "popcon.py"]
        if libraries(dict.fromkeys(library, "popcon"))[0]:  # pip has installed it in the meantime
            foreign |= {*library, *(path for path in made if path.endswith(".pyc"))}
        return [path for path in made if path not in foreign]

    def clean_up() -> "list[str]":
        """Remove what an install() that was killed has made, print and return it."""
        gone = []
        for journal in journals():
            gone += remove(unclaimed(made_by_install(journal) or [])) + remove([journal])
        for path in gone:
            print(f"removed {path}, left by an install that was cut short")
        return gone

    def uninstall() -> int:
        """Remove what install() wrote in this environment, and only that; print it. Returns the exit status."""
        gone = clean_up()
        activating: list[str] = []
        made: list[str] = []
        lines = []
        for path in activation_files((3, 17)) | activation_files((3, 18)):
            listed = made_by_install(path)
            if listed is not None:
                activating.append(path)
                made += listed
            elif os.path.lexists(path):
                lines.append(f"left {path}: popcon did not write it")
        ours = unclaimed(made)
        for path in dict.fromkeys(made):
            if path not in ours and path.endswith(".py"):
                lines.append(f"left {path}: it belongs to an installed library")
        # Activation files last: as long as they are there, it can be tried again.
        lines += [f"removed {path}" for path in remove([*ours, *activating])]
        if not activating and not gone:
            lines.append(f"nothing to do: `python -m popcon install` has written nothing in {sys.prefix}")
        print(*lines, sep="\n")  # at last, for who reads it may be gone
        return 0

    def run(program: "Sequence[str]", explain: bool = False) -> None:
        """Run a program as python would, and say on stderr at its end what would be sent; nothing is.

        Takes what stands after `python` on a command line: -c CODE, -m MODULE, - or a path,
        and arguments. The program's exceptions pass, without the frames of this file.
        """
        kind, arguments = program[0], list(program[1:])
        is_silent = opted_out()
        # Not by this process, and not by a reporter that is switched on here or in a child.
        os.environ["DO_NOT_TRACK"] = "1"
        machinery, runpy = standard("importlib.machinery"), standard("runpy")
        main = sys.modules["__main__"] = type(sys)("__main__")
        namespace = vars(main)
        namespace["__loader__"] = machinery.BuiltinImporter
        if sys.version_info < (3, 14):
            namespace["__annotations__"] = {}
        namespace["__builtins__"] = sys.modules["builtins"]
        start, module, name = "", "", "<string>"
        source: str | bytes = b""
        if kind[:2] in ("-c", "-m"):
            what = kind[2:] or arguments.pop(0)
            kind = kind[:2]
            if kind == "-m":
                start, module = os.getcwd(), what
            else:
                source = standard("textwrap").dedent(what) if sys.version_info >= (3, 14) else what
                if sys.version_info >= (3, 13):  # whose tracebacks show the code
                    lines = source.splitlines(keepends=True)
                    standard("linecache").cache[name] = (len(source), None, lines, name)
        elif kind != "-" and (os.path.isdir(kind) or standard("zipfile").is_zipfile(kind)):
            start, module = os.path.abspath(kind), "__main__"
        else:
            name = "<stdin>" if kind == "-" else os.path.join(os.getcwd(), kind)
            try:
                with open(0 if kind == "-" else kind, "rb", closefd=kind != "-") as file:
                    source = file.read()
            except OSError as error:
                reason = f"[Errno {error.errno}] {error.strerror}"
                print(f"{sys.executable}: can't open file {name!r}: {reason}", file=sys.stderr)
                raise SystemExit(2) from None
            namespace["__file__"] = name
            if sys.version_info < (3, 15):
                namespace["__cached__"] = None
            if kind != "-":
                start = os.path.dirname(os.path.realpath(kind))
                compiled = name.endswith(".pyc")
                loader = machinery.SourcelessFileLoader if compiled else machinery.SourceFileLoader
                namespace["__loader__"] = loader("__main__", name)
        sys.argv = [kind, *arguments]
        if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
            sys.path[0] = start
        elif kind != "-m" and module:
            sys.path.insert(0, start)  # a folder or an archive, with a __main__ in it
        known = set(sys.modules)
        atexit.register(_say_what_would_be_sent, known if explain else None, is_silent)
        _reporter.take_baseline()
        _reporter.baseline[os.path.abspath(__file__)] = "popcon"
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_reporter.after_fork)
        try:
            if module:
                runpy._run_module_as_main(module, alter_argv=kind == "-m")
            elif name.endswith(".pyc"):
                exec(namespace["__loader__"].get_code("__main__"), namespace)
            else:
                exec(compile(source, name, "exec", dont_inherit=True), namespace)
        except BaseException:
            _hide_own_frames(runpy.__file__, "<frozen runpy>")
            raise

    def _hide_own_frames(*others: str) -> None:
        """Let sys.excepthook, even the program's own, see the traceback as without the frames of this file.

        Takes the files of other frames that may stand before these.
        """
        show = sys.excepthook
        own = main.__code__.co_filename

        def excepthook(kind: "type[BaseException]", error: BaseException, trace: "Any") -> None:
            rest = trace
            while rest and rest.tb_frame.f_code.co_filename in (own, *others):
                if rest.tb_frame.f_code.co_filename == own:
                    trace = rest.tb_next
                rest = rest.tb_next
            show(kind, error.with_traceback(trace), trace)

        sys.excepthook = excepthook

    def _say_what_would_be_sent(known: "set[str] | None", is_silent: bool) -> None:
        try:
            modules = dict(sys.modules)  # before update() needs some of its own
            _reporter.update()
            lines = explanation(modules, known) if known is not None else []
            _, _, prefix, rate = map(setting, SETTINGS)
            used = [statsd_line(name, prefix, rate).decode() for name in sorted(_reporter.used)]
            if is_silent:
                used = ["popcon: nothing would be sent: DO_NOT_TRACK is set"]
            lines = [*lines, *used] or ["popcon: nothing would be sent: no library was used"]
        except Exception as error:
            lines = [f"popcon: nothing would be sent: {error}"]
        try:
            if sys.stderr:
                print(*lines, sep="\n", file=sys.stderr)
        except Exception:  # closed, or the program's own: then nobody is listening
            sys.stderr = None  # Python would try it again, and change the exit status

    def explanation(loaded: "Mapping[str, object]", known: "set[str]") -> "list[str]":
        """Return a line for each top-level module loaded that is not known: whose it is, or why it is nobody's.

        Goes by what Reporter.update() has found.
        """
        tops: dict[str, dict[str, object]] = {}
        for name, module in loaded.items():
            if type(name) is str and name not in known and name.partition(".")[0] not in ("__main__", "__mp_main__"):
                tops.setdefault(name.partition(".")[0], {})[name] = module
        files = [executed_files(modules) for modules in tops.values()]
        lines = []
        width = max(map(len, tops), default=0)
        for (top, modules), own, owners in zip(tops.items(), files, libraries(*files)):
            if owners & _reporter.used:
                text = ", ".join(sorted(owners & _reporter.used))
            elif owners:
                text = f"not counted: {', '.join(sorted(owners))} was loaded before, in the baseline"
            elif own:
                file = next(iter(own))
                text = f"not counted: {'an editable install' if is_editable(file) else 'no library lists'}, {file}"
            elif top in sys.stdlib_module_names:
                text = "not counted: standard library"
            elif any(type(module) is type(sys) for module in modules.values()):
                text = "not counted: no file"
            else:
                text = "not counted: not executed, loaded lazily"
            lines.append(f"{top:{width}}  {text}")
        return sorted(lines)

    def is_editable(file: str) -> bool:
        """Tell whether the file is in the source tree of an editable install (PEP 610), or a finder of one."""
        json, parse = standard("json"), standard("urllib.parse")
        for info in installed_metadata():
            try:
                origin = json.loads(_read(f"{info}{os.sep}direct_url.json") or b"{}")
                tree = parse.unquote(parse.urlsplit(origin["url"]).path)
                if origin["dir_info"]["editable"] and file.startswith(os.path.join(tree, "")):
                    return True
            except (ValueError, KeyError, TypeError):
                pass  # there is none, or it is rubbish
        return os.path.basename(file).startswith("__editable__")

    # ---- the answer: usage ----------------------------------------------------------------

    HEADER = "PYTHON_POPCONTEST_PROMETHEUS_HEADER"

    def usage(options: "Any") -> int:
        """Say of each installed library how much it is used, and which can go; return the exit status.

        Takes what main() has parsed. Raises SystemExit with a sentence if the counts can't be had.
        """
        if not sys.stdout:
            raise SystemExit("popcon: stdout is closed")
        try:
            metric = options.metric or metric_name(setting("PYTHON_POPCONTEST_STATSD_PREFIX"))
            headers = dict(_header(text) for text in [os.environ.get(HEADER, ""), *options.header] if text)
            rate = setting("PYTHON_POPCONTEST_STATSD_SAMPLE_RATE")
        except ValueError as error:
            raise SystemExit(f"popcon: {error}") from None
        doing = ["asking for the counts"]
        done = _show_progress(doing)
        now = standard("time").time()
        start = now - options.window
        try:
            if options.prometheus:
                ask = prometheus(options.prometheus, headers)
                counts, since = counts_in_prometheus(ask, metric, options.match, start, now)
            else:
                counts, since = counts_at_exporter(options.metrics, headers, metric)
                since = since and min(since, now)  # its clock may be wrong
            if not any(counts.values()):
                what = (
                    f"no count of {metric} rose"
                    if counts
                    else f"there is no counter {metric}{options.match and ' that matches'}"
                )
                where = options.metrics or f"the last {_duration(options.window)}"
                raise OSError(
                    f"{what} in {where}; does anything report (see selftest), and is that its name (see --metric)?"
                )
            doing[0] = "reading what is installed"
            rows = judged(counts, options.keep)
        except OSError as error:
            raise SystemExit(f"popcon: {_printable(str(error))}") from None
        finally:
            done()
        if float(rate) < 1:
            _note(f"a sample of {rate} of the processes reports: rare uses may be missed")
        young = ""
        if since is None:
            young = "it is not known since when this was counted"
        elif since > start + 0.01 * options.window:
            young = f"this was counted since {_date(since)} only"
        if young:
            hint = f"; ask for --window {_duration(now - since)} if that is long enough" if since else ""
            _note(f"nothing is called unused: {young}{hint}")
            for row in rows:
                if row["status"] == "unused":
                    row.update(status="unknown", reason=young)
        if any(row["status"] == "unused" for row in rows) and not _all_processes_report():
            _note("only IPython and Jupyter report here by themselves: what plain scripts import is not known")
        if options.unused:
            sys.stdout.writelines(row["library"] + "\n" for row in rows if row["status"] == "unused")
            return 1 if young else 0
        for row in rows:
            if row["processes"] and row["processes"] < options.at_least:
                row["processes"] = None
        if options.json:
            print(standard("json").dumps(rows, indent=1))
        else:
            print(*table(rows, options.at_least, _date(since) if since else ""), sep="\n")
        return 0

    CLEAR = "\r\33[K"  # what stands in this line of a terminal

    def _note(text: str) -> None:
        if sys.stderr:
            print(f"{CLEAR * _is_terminal(sys.stderr)}popcon: {text}", file=sys.stderr)

    def _is_terminal(stream: "Any") -> bool:
        """Tell whether the stream is a terminal that knows colours, and how to clear a line."""
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"

    # Where the counts come from.

    def metric_name(prefix: str) -> str:
        """Return the name that README's mapping rules give to the counters of a statsd prefix.

        The word after `namespace` becomes a label.
        """
        words = prefix.split(".")
        if "namespace" in words[:-2]:
            place = words.index("namespace")
            del words[place : place + 2]
        return "_".join(words).replace("-", "_")

    def _header(text: str) -> "tuple[str, str]":
        """Return name and value of an HTTP header (RFC 9110); raise ValueError, which never shows a secret."""
        name, colon, value = (part.strip() for part in text.partition(":"))
        if not colon or not _made_of(name, "-_") or not (value.isascii() and value.isprintable()):
            raise ValueError(f"a header must read 'Name: value', in --header and in {HEADER}")
        return name, value

    def fetch(url: str, headers: "dict[str, str]", form: "Mapping[str, object] | None" = None) -> str:
        """Return what an HTTP server answers to a GET, or to a POST of a long form. Raises OSError with a sentence.

        Follows no redirect: what it leads to is a log-in page, and the headers may hold a secret.
        """
        request, http = standard("urllib.request"), standard("http.client")
        clock = standard("time").monotonic

        class Stay(request.HTTPRedirectHandler):  # type: ignore[misc, name-defined]
            def redirect_request(self, *ignored: object) -> None:
                return None

        data = standard("urllib.parse").urlencode(form or {})
        patience = 120  # seconds, after which Prometheus gives up as well
        end, text = clock() + patience, b""
        try:
            # Some proxies let a GET pass only, and some no long one.
            asked = (
                request.Request(url, data.encode(), headers)
                if len(data) > 2000
                else request.Request(f"{url}?{data}".rstrip("?"), None, headers)
            )
            with request.build_opener(Stay).open(asked, timeout=patience) as answer:
                while chunk := answer.read1(1 << 20):
                    text += chunk
                    if clock() > end or len(text) > 1 << 28:
                        raise OSError("its answer does not end")
                if answer.length:  # what Content-Length says is still to come
                    raise OSError("its answer is cut off")
        except request.HTTPError as error:
            if error.headers.get("Location"):
                why = f"redirects to {error.headers['Location']}; does it want a --header 'Authorization: ...'?"
            else:
                why = f"answers {error.code} {error.reason}"
                try:
                    text = error.read1(1 << 16)
                    why += f": {standard('json').loads(text)['error']}"  # as Prometheus says what is wrong
                except (OSError, ValueError, KeyError, TypeError, RecursionError, http.HTTPException):
                    pass
            raise OSError(f"{url} {why}") from None
        except (OSError, ValueError, http.HTTPException) as error:
            raise OSError(
                f"{url} cannot be read: {getattr(error, 'reason', '') or error or type(error).__name__}"
            ) from None
        return text.decode("utf-8", "replace")

    def prometheus(url: str, headers: "dict[str, str]") -> "Callable[..., Any]":
        """Return a function that asks Prometheus' HTTP API at the URL, under which api/v1 lies.

        It takes the end point and its parameters, times in seconds. It returns a dictionary: of each
        series the labels, as a frozenset of pairs without the metric's name, to a list of
        (time, value). Raises OSError with a sentence.
        """

        def ask(what: str, **form: object) -> "dict[Any, list[tuple[float, float]]]":
            where = f"{url.rstrip('/')}/api/v1/{what}"
            text = fetch(where, headers, form)
            try:
                answer = standard("json").loads(text)
                # PromQL's remarks are harmless. Thanos and Mimir say so what was out of reach.
                warnings = [text for text in answer.get("warnings", ()) if not text.startswith("PromQL")]
                data = answer["data"]
                if what == "series":
                    data = {"result": [{"metric": labels, "values": []} for labels in data]}
                found = {
                    frozenset(pair for pair in series["metric"].items() if pair[0] != "__name__"): [
                        (_number(time), _number(value))
                        for time, value in (series["values"] if "values" in series else [series["value"]])
                    ]
                    for series in data["result"]
                }
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise OSError(
                    f"{where} does not answer as Prometheus does, but {' '.join(text[:60].split())!r}"
                ) from None
            if warnings:
                raise OSError(f"{where} does not know all: {warnings[0]}")
            return found

        return ask

    REACH = 2 * 3600  # seconds that may lie between two samples of a series: some fetch once an hour, for privacy

    def counts_in_prometheus(
        ask: "Callable[..., Any]", metric: str, match: str, start: float, end: float
    ) -> "tuple[dict[str, float], float | None]":
        """Return by how much the counters of each library rose between two times, and since when that is known.

        Takes the function that prometheus() returns, and label matchers as PromQL writes them.
        increase() would not do: it estimates, and misses the first sample of a series, so that a
        library used once shows 0, and a restart of the exporter that leads from 1 to 1. So the
        values at the end of each of an exporter's lives, from one start to the next, are added
        up; only around those ends are samples read.
        """

        def selector(*matchers: str) -> str:
            return "{" + ",".join(filter(None, [f'__name__="{metric}"', match, *matchers])) + "}"

        def last(begin: float, end: float, *matchers: str) -> "dict[Any, float]":
            found = ask("query", query=f"last_over_time({selector(*matchers)}{_range(begin, end)})", time=end)
            return {labels: samples[-1][1] for labels, samples in found.items() if _library(labels)}

        series = {
            labels
            for labels in ask("series", **{"match[]": selector(), "start": start, "end": end})
            if _library(labels)
        }
        if not series:
            return {}, None
        reach = max(REACH, (end - start) / POINTS)
        lives = exporter_lives(ask, series, start - REACH, end, reach)
        near: dict[Any, Any] = {}  # exporters by target: two clusters can have the same targets
        for exporter in lives:
            near.setdefault(_target(exporter), []).append(exporter)
        exporters = {  # of each series its own
            labels: max(near.get(_target(labels), [None]), key=lambda exporter: len(labels & (exporter or set())))
            for labels in series
        }
        counts = dict.fromkeys(map(_library, series), 0.0)
        recent = last(start - REACH, start)
        latest: dict[Any, float] = {}
        seen, gap = 0.0, 0.0  # until when an exporter was, and how long none was between
        for begin, finish, exporter in sorted((*life, exporter) for exporter, times in lives.items() for life in times):
            gap += max(0.0, begin - max(start, seen or begin))
            seen = max(seen, finish)
            if finish > start:
                own = [f"{key}={_quoted(value)}" for key, value in _target(exporter)]
                opening = begin - 0.002  # Prometheus 3 leaves out what lies where a range begins
                before = recent if begin <= start - REACH else last(opening, start, *own) if begin < start else {}
                for labels, value in last(max(opening, start, finish - reach), finish + 0.001, *own).items():
                    if exporters.get(labels) == exporter:
                        latest[labels] = value
                        counts[_library(labels)] += value - before.get(labels, 0.0)
        # Series without an exporter whose restarts can be seen, and those that ended before it did (as with a ttl in its
        # mapping): too much is better than too little.
        rest = series - latest.keys()
        if rest:
            for labels, value in last(start, end, _any_of("library", rest)).items():
                if labels in rest:
                    latest[labels] = value
                    counts[_library(labels)] += value
        if any(exporters.get(labels) is None for labels in rest & latest.keys()):
            _note("not every exporter's process_start_time_seconds is known: more is counted than this time")
        gap += max(0.0, end - seen)
        if lives and gap > 0.01 * (end - start) + REACH:
            _note(f"no exporter was seen in {_duration(gap)} of this time: what was used then is not known")
        # Counters that were there at the start, or not long before, say that the counts reach back to it.
        if recent:
            return counts, start
        since, step = end, end - start
        early = _any_of("library", sorted(latest, key=latest.__getitem__)[-9:])  # the most used were used first
        while step > 1:  # closer and closer: of so much data Prometheus tells a few hundred points only
            begin, step = since - step, max(1.0, step / POINTS)
            known = f"count(last_over_time({selector(early)}{_range(0, step + 0.002)}))"
            for samples in ask("query_range", query=known, start=begin, end=since + step, step=step).values():
                since = samples[0][0]
        return counts, since

    def exporter_lives(
        ask: "Callable[..., Any]", series: "Iterable[Any]", start: float, end: float, reach: float
    ) -> "dict[Any, list[tuple[float, float]]]":
        """Return from when to when each of the exporters of these series was seen, in each of its lives.

        An exporter is known by the labels of its process_start_time_seconds. When its last life
        ends is known to `reach` seconds.
        """
        clock = f"process_start_time_seconds{{{','.join(_any_of(key, series) for key in TARGET)}}}"
        step = max(1.0, (end - start) / POINTS)
        query = f"last_over_time({clock}{_range(0, reach)})"
        lives = {}
        for exporter, samples in ask("query_range", query=query, start=start, end=end + step, step=step).items():
            begin, finish, spans = samples[0][0], min(samples[-1][0], end), []
            if begin > start:
                samples.insert(0, (begin - step, 0.0))  # between the two there may have been more
            for (before, old), (after, new) in zip(samples, samples[1:]):
                if old != new:  # when exactly, and how often?
                    own = ",".join(f"{key}={_quoted(value)}" for key, value in exporter)
                    query = f"process_start_time_seconds{{{own}}}{_range(before - reach, after)}"
                    close = ask("query", query=query, time=after).get(exporter, [])
                    if not old and close:
                        begin = close[0][0]
                    for (leave, left), (enter, entered) in zip(close, close[1:]):
                        # Otherwise it was the machine's clock that was set right, by which Linux tells the start.
                        restarted = left != entered and entered - left > leave - begin - 2
                        if restarted and enter > begin:
                            spans.append((begin, leave))
                            begin = enter
            lives[exporter] = [*spans, (begin, finish)]
        return lives

    POINTS = 500  # that Prometheus is asked for of a time
    TARGET = "job", "instance"  # the labels by which Prometheus tells what it fetches from

    def _any_of(key: str, series: "Iterable[Any]") -> str:
        """Return a matcher, as PromQL writes it, for the values that the label has in the series."""
        escape = standard("re").escape
        return f"{key}=~{_quoted('|'.join(sorted({escape(dict(labels).get(key, '')) for labels in series})))}"

    def _target(labels: "frozenset[tuple[str, str]]") -> "frozenset[tuple[str, str]]":
        return frozenset(pair for pair in labels if pair[0] in TARGET)

    def _library(labels: "frozenset[tuple[str, str]]") -> str:
        return normalized(str(dict(labels).get("library", "")))

    def _number(text: str) -> float:
        number = float(text)
        if number - number != 0:
            raise ValueError("infinite, or not a number")
        return number

    def _quoted(text: str) -> str:
        return str(standard("json").dumps(text, ensure_ascii=False))  # PromQL reads text as Go and JSON do

    def _range(start: float, end: float) -> str:
        return f"[{max(1, round((end - start) * 1000))}ms]"

    def counts_at_exporter(
        source: str, headers: "dict[str, str]", metric: str
    ) -> "tuple[dict[str, float], float | None]":
        """Return what statsd_exporter has counted of each library, and since when, None if that is not told.

        Takes the URL of its metrics or a file that they were saved in, in Prometheus' text format.
        """
        re = standard("re")
        if re.match("https?://", source):
            text = fetch(source, headers)
        else:
            try:
                with open(source, encoding="utf-8", errors="replace") as file:
                    text = file.read()
                saved = os.stat(source).st_mtime
            except OSError as error:
                raise OSError(f"{source} cannot be read: {error.strerror}") from None
            if standard("time").time() - saved > 86400:
                _note(f"{source} was saved on {_date(saved)}: what was used since then is not in it")
        counts: dict[str, float] = {}
        since, is_known = None, False
        sample = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+([^\s#]+)')
        for line in text.split("\n"):  # and nowhere else: a label may hold anything
            found = sample.match(line)
            is_known |= found is not None
            try:
                if found and found[1] == "process_start_time_seconds":
                    since = max(since or 0.0, _number(found[3]))  # of several exporters in one file
                elif found and found[1] == metric:
                    label = re.search(r'(?:^|,)\s*library="([\w.-]*)"', found[2] or "")
                    name = normalized(label[1]) if label else ""
                    if name:
                        counts[name] = counts.get(name, 0.0) + _number(found[3])
            except ValueError:
                raise OSError(f"{source} is no list of metrics: {line[:80]!r}") from None
        if not is_known:
            raise OSError(f"{source} is no list of metrics, but begins {' '.join(text[:60].split())!r}")
        if not text.endswith("\n"):  # as the format wants it
            raise OSError(f"{source} is cut off: its last line does not end")
        return counts, since

    # What is installed, and what may go.

    # What hosts the sessions, installs, or is in the baseline itself: that nobody imports them says nothing.
    HOSTS = {
        *(
            "ipykernel",
            "ipython",
            "jupyter",
            "jupyter-server",
            "jupyterhub",
            "jupyterlab",
            "nbclassic",
            "notebook",
            "voila",
        ),
        *("conda", "mamba", "pip", "setuptools", "uv", "wheel", "popcon", "popularity-contest"),
    }

    class Library:
        """What the metadata (PEP 376, PEP 627) say of an installed library.

        `files` are the paths of its files with their sizes in bytes, bytecode included, none if there
        is no RECORD; `modules` those of them that can be imported, `commands` those that can be run.
        """

        def __init__(self, info: str) -> None:
            fields = dict(reversed(metadata(info)))  # the first of several decides
            self.info, self.name, self.version = info, normalized(fields.get("name", "")), fields.get("version", "")
            separator = os.fsencode(os.sep)
            self.folder = os.fsencode(os.path.dirname(info)).replace(separator, b"/") + b"/"
            self.files: dict[bytes, int] = {}
            self.modules, self.commands = [], []
            suffixes = tuple(os.fsencode(suffix) for suffix in standard("importlib.machinery").all_suffixes())
            sources: dict[bytes, set[bytes]] = {}  # by the folder of their bytecode
            try:
                lines = record_lines(_read(f"{info}{os.sep}RECORD"))
            except Exception as error:  # csv has its limits
                debug(f"cannot read {info}: {error!r}")
                lines = []
            for line in lines:
                relative = line.partition(b",")[0]
                if relative:
                    path, rooted = self.folder + relative, b"/" + relative
                    is_plain = b"/." not in rooted and b"//" not in rooted  # neither ../ nor absolute
                    if not is_plain:
                        path = os.path.normpath(os.path.join(self.folder, relative)).replace(separator, b"/")
                    self.files[path] = _size(path)
                    place, _, base = path.rpartition(b"/")
                    if base.endswith(b".py"):
                        sources.setdefault(place + b"/__pycache__", set()).add(base[:-3])
                    # libfoo.so is loaded by others, not imported; and of odd paths libraries() does not tell the owner.
                    if is_plain and base.endswith(suffixes) and not base.startswith(b"lib"):
                        self.modules.append(path)
                    # A bin in the same folder (pip install --target), or above it, not one within a package.
                    if place.endswith((b"/bin", b"/Scripts")) and path.count(b"/") <= self.folder.count(b"/") + 1:
                        self.commands.append(path)
            for place, names in sources.items():
                try:
                    compiled = [place + b"/" + base for base in os.listdir(place) if base.partition(b".")[0] in names]
                except (OSError, ValueError):
                    continue  # never imported
                self.files |= {path: _size(path) for path in compiled if path not in self.files}

        def obstacle(self, everywhere: bool) -> str:
            """Say why a count of zero proves nothing, "" if it does; takes whether every process here reports."""
            entry_points = _read(f"{self.info}{os.sep}entry_points.txt").decode("utf-8", "replace")
            groups = set(standard("re").findall(r"(?m)^\s*\[\s*([^]\s]+)", entry_points))
            plugs = sorted(groups - {"console_scripts", "gui_scripts"})
            for path in self.files:
                place, _, base = path.rpartition(b"/")
                if place + b"/" == self.folder and base.endswith((b".pth", b".start", b"customize.py")):
                    return "takes part in every start of Python"
                if b"/share/jupyter/" in path or b"/etc/jupyter/" in path:
                    return "extends Jupyter"
            if not library_name(self.info):
                return "editable installs are not counted"
            if not self.files:
                return "has no RECORD of its files; pip did not install it"
            if not self.modules:
                return "has nothing to import"
            if plugs:
                return f"others may find it as a plug-in: {', '.join(plugs)}"
            if (self.commands or groups) and not everywhere:
                return "its commands may be in use: they do not report here"
            for command in map(os.fsdecode, self.commands):
                if b"python" not in _read(command, 100).partition(b"\n")[0]:
                    return f"has a command that is no Python: {os.path.basename(command)}"
            # exec*() makes the process another program (dotenv run), _exit() ends a daemon's parent, a signal the
            # process: without a report. Programs do it at the top of their package; to read all below takes seconds.
            if not (self.commands or groups or any(path.endswith(b"/__main__.py") for path in self.modules)):
                return ""
            depth = self.folder.count(b"/") + 1
            top = [path for path in self.modules if path.endswith(b".py") and path.count(b"/") <= depth]
            for source in map(os.fsdecode, self.commands + top):
                text = _read(source)
                for call in (b"execv", b"execl", b"os._exit", b"os.abort", b"raise_signal", b"kill(os.getpid()"):
                    if call in text:
                        return f"its commands may end without a report: {call.decode()} in {os.path.basename(source)}"
            return ""

    def _size(path: bytes) -> int:
        try:
            return os.stat(path, follow_symlinks=False).st_size
        except (OSError, ValueError):
            return 0  # somebody removed it, or the RECORD is rubbish

    def _configured() -> set[bytes]:
        """Return the words in the site's configuration of IPython and Jupyter, without comments.

        What it loads may be in every session's baseline (c.InteractiveShellApp.matplotlib = "inline"),
        or run in servers and kernels that do not report.
        """
        words: set[bytes] = set()
        for prefix in (sys.prefix, "/usr/local", "/usr", "/"):
            for below in ("etc/ipython", "etc/jupyter", "share/jupyter/kernels"):
                for folder, _, names in os.walk(os.path.join(prefix, below)):
                    for name in names:
                        if name.endswith((".py", ".ipy", ".json")):
                            content = _read(os.path.join(folder, name))
                            words.update(
                                standard("re").findall(rb"\w+", standard("re").sub(rb"(?m)^\s*#.*", b"", content))
                            )
        return words

    def judged(counts: "Mapping[str, float]", keep: "Sequence[str]") -> "list[dict[str, Any]]":
        """Return a row for each library, installed or counted, in the order of their names: what --json tells.

        Takes the names or globs of what is to be kept. Only what nobody used, what can be judged,
        and what nothing that stays requires, is `unused`.
        """
        fnmatch, re = standard("fnmatch"), standard("re")
        installed: dict[str, Library] = {}
        infos: dict[str, list[str]] = {}  # a library may be there more than once: all that its metadata require counts
        for info in installed_metadata():
            library = Library(info)
            if library.name:
                infos.setdefault(library.name, []).append(info)
            # Without a name the metadata are rubbish, as selftest tells; elsewhere an egg-info is somebody's source tree.
            if library.name and (library.files or library.folder.endswith((b"-packages/", b".egg/"))):
                installed.setdefault(library.name, library)
        reasons = {name: library.obstacle(_all_processes_report()) for name, library in installed.items()}
        reasons |= dict.fromkeys(libraries(executed_files(dict(sys.modules)))[0], "is loaded at every start, uncounted")
        words = _configured()
        for name, library in installed.items():
            tops = {path[len(library.folder) :].partition(b"/")[0].partition(b".")[0] for path in library.modules}
            if tops & words and not reasons[name]:
                reasons[name] = "the configuration of IPython or Jupyter names it"
        reasons |= dict.fromkeys(HOSTS, "belongs to what runs sessions or installs")
        for pattern in keep:
            names = fnmatch.filter(installed, re.sub(r"[-_.]+", "-", pattern).lower())
            reasons |= dict.fromkeys(names, "is to be kept")
            if not names:
                _note(f"nothing installed is called {pattern!r}, which was to be kept")
        # Who uninstalls one of two libraries that share a file takes it from the other.
        shared: dict[str, set[str]] = {}
        owners: dict[bytes, str] = {}
        for name, library in installed.items():
            for path in [*library.modules, *library.commands]:
                other = owners.setdefault(path, name)
                if other != name:
                    shared.setdefault(name, set()).add(other)
                    shared.setdefault(other, set()).add(name)
        stays = [name for name in infos if name not in installed or counts.get(name) or reasons[name]]
        requirers = required(stays, infos, shared)
        rows = []
        for name in sorted(installed.keys() | {name for name, count in counts.items() if count}):
            processes = max(1, round(counts[name])) if counts.get(name) else 0
            required_by = sorted(requirers.get(name, ()))
            if name not in installed:
                status, reason = "absent", ""
            elif processes:
                status, reason = "used", ""
            elif required_by:
                status, reason = "required", ""
            else:
                status, reason = "unknown" if reasons[name] else "unused", reasons[name]
            here = installed.get(name)
            rows.append(
                {
                    "library": name,
                    "version": _printable(here.version) if here else None,
                    "processes": processes,
                    "status": status,
                    "required_by": required_by,
                    "reason": _printable(reason),
                    "bytes": sum(here.files.values()) if here and here.files else None,
                }
            )
        return rows

    def _all_processes_report() -> bool:
        """Tell whether start-up has set popcon up: it is imported then, and not only run as a program, or by IPython."""
        return bool(getattr(sys.modules.get("popcon"), "_is_set_up", False)) and ipython_shell() is None

    # How it is shown.

    def table(rows: "Sequence[Mapping[str, Any]]", least: int, since: str) -> "Iterator[str]":
        """Yield the lines of the table, as wide as the terminal.

        Counts below `least` are None in the rows. Takes the date since when was counted, "" if it is not known.
        """
        width = max(40, standard("shutil").get_terminal_size((100, 24)).columns)
        is_narrow = sys.stdout.isatty() or bool(os.environ.get("COLUMNS"))  # in a file lines may be longer
        is_utf8 = "utf" in (sys.stdout.encoding or "").lower()
        is_plain = not _is_terminal(sys.stdout) or bool(os.environ.get("NO_COLOR"))
        installed = [row for row in rows if row["status"] != "absent"]

        def place(row: "Mapping[str, Any]") -> "tuple[int, int, str]":
            """By use; what nobody used by its size."""
            return -(row["processes"] or 0), -(row["bytes"] or 0) if row["processes"] == 0 else 0, row["library"]

        ordered = sorted(rows, key=place)
        groups = {
            status: [row for row in ordered if row["status"] == status]
            for status in ("used", "unused", "required", "unknown", "absent")
        }
        most = max((row["processes"] or 0 for row in rows), default=0) or 1
        digits = max(len("processes"), len(f"{most:,}"))
        left = width - len("rank    ") - digits - len("  123.4 MB")
        versions = min(12, max(map(len, ["version", *(row["version"] or "" for row in rows)]))) if left > 50 else 0
        left -= versions + 2 * bool(versions)
        names = min(left - 10 if left > 25 else left, max(map(len, ["library", *(row["library"] for row in rows)])))
        bars = left - names - 2 if left > 25 else 0

        def cut(text: str, size: int) -> str:
            return text if len(text) <= size else text[: size - 1] + ("…" if is_utf8 else "~")

        def paint(code: int, text: str) -> str:
            return text if is_plain or not text.strip() else f"\33[{code}m{text}\33[m"

        def bar(count: int) -> str:
            if not is_utf8:
                return "#" * round(bars * count / most or 1)
            whole, eighths = divmod(max(1, round(8 * bars * count / most)), 8)
            return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()

        def columns(rank: object, library: str, version: str, number: str) -> str:
            version = f"  {cut(version, versions):{versions}}" if versions else ""
            return f"{rank:>4}  {cut(library, names):{names}}{version}  {number:>{digits}}"

        def counted(shown: "Iterable[Mapping[str, Any]]") -> "Iterator[str]":
            for rank, row in enumerate(shown, 1):
                count = f"<{least}" if row["processes"] is None else f"{row['processes']:,}"
                drawn = paint(32, f"  {bar(row['processes']) if row['processes'] else '':{bars}}") if bars else ""
                size = _bytes([row]) if row["status"] == "used" else ""
                yield f"{columns(rank, row['library'], row['version'] or '', count)}{drawn}  {size:>8}".rstrip()

        gap = " " * (bars + 2 if bars else 0)
        yield paint(1, f"{columns('rank', 'library', 'version', 'processes')}{gap}  {'size':>8}")
        yield from counted(groups["used"])
        for status, title in {
            "unused": "Can go",
            "required": "Needed by others",
            "unknown": "Cannot be judged",
        }.items():
            shown = groups[status]
            if shown:
                yield ""
                yield paint(
                    1, f"{title}: {len(shown)} {'library' if len(shown) == 1 else 'libraries'}, {_bytes(shown)}"
                )
            for row in shown:
                others = row["required_by"]
                text = row["reason"] or ", ".join(others[:5]) + (f" and {len(others) - 5} others" if others[5:] else "")
                text = f"{columns('', row['library'], row['version'], _bytes([row]))}  {text}".rstrip()
                yield cut(text, width) if is_narrow else text
        if groups["absent"]:
            yield ""
            yield paint(1, "Counted, but not installed here")
            yield from counted(groups["absent"])
        yield ""
        unused = groups["unused"]
        lines = [f"{len(unused)} of {len(installed)} libraries can go, {_bytes(unused)} of {_bytes(installed)}."]
        if unused:
            who = "Nobody" if _all_processes_report() else "No session"
            lines.append(f"{who} has imported them since {since}, and nothing that stays needs them.")
        elif since:
            lines.append(f"Counted since {since}.")
        for line in lines:
            yield from standard("textwrap").wrap(line, width)

    def _bytes(rows: "Iterable[Mapping[str, Any]]") -> str:
        """Return how much room the libraries take, in units of the SI."""
        sizes = [row["bytes"] for row in rows]
        size = float(sum(filter(None, sizes)))
        if sizes and not any(sizes):
            return "?"
        units = ["B", "kB", "MB", "GB"]
        while size >= 999.95 and len(units) > 1:
            size /= 1000
            units.pop(0)
        return f"{size:.{0 if units[0] == 'B' else 1}f} {units[0]}"

    def _date(time: float) -> str:
        """Return the local time as a date, with the hour if that is not long ago."""
        clock = standard("time")
        return str(
            clock.strftime(
                "%Y-%m-%d" if clock.time() - time > 5 * 86400 else "%Y-%m-%d %H:%M:%S", clock.localtime(time)
            )
        )

    UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}

    def seconds(duration: str) -> float:
        """Return the seconds of a duration as PromQL writes it: 90d, 1h30m. Raises ValueError."""
        parts = standard("re").findall(r"(\d+)(ms|[smhdwy])", duration)
        total = float(sum(int(number) * UNITS[unit] for number, unit in parts))
        if "".join(map("".join, parts)) != duration or not 1 <= total < 100 * UNITS["y"]:
            raise ValueError("must be a duration such as 90d, 12h or 1h30m")
        return total

    def _url(text: str) -> str:
        parts = standard("urllib.parse").urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ValueError(
                "must be http://HOST:PORT, and a path if Prometheus is under one; who you are goes into --header"
            )
        return text

    def _matchers(text: str) -> str:
        if not (text.startswith("{") and text.endswith("}")):
            raise ValueError("must be label matchers as PromQL writes them, such as '{namespace=\"prod\"}'")
        return text[1:-1].strip().rstrip(",")

    def _duration(time: float) -> str:
        """Return the duration, rounded down, as seconds() reads it."""
        unit = max((unit for unit in "smhd" if time >= 2 * UNITS[unit]), key=UNITS.__getitem__, default="s")
        return f"{max(1, int(time / UNITS[unit]))}{unit}"

    def _printable(text: str) -> str:
        """Return what a server or metadata say, without what could steer a terminal."""
        return "".join(letter if letter.isprintable() else " " for letter in text)

    def _show_progress(doing: "list[str]") -> "Callable[[], None]":
        """Say on a terminal what is being done, if it takes longer than a second; return what ends it."""
        if not _is_terminal(sys.stderr):
            return lambda: None
        threading = standard("threading")
        done = threading.Event()

        def show() -> None:
            wait = 1.0
            while not done.wait(wait):
                print(f"{CLEAR}{doing[0]} ...", end="", file=sys.stderr, flush=True)
                wait = 0.1
            if wait < 1:
                print(CLEAR, end="", file=sys.stderr, flush=True)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()

        def stop() -> None:
            done.set()
            thread.join()

        return stop

    # ---- the commands ---------------------------------------------------------------------

    def run_command_line(arguments: "Sequence[str] | None") -> int:
        """Answer main()."""
        argparse = standard("argparse")

        def checked(read: "Callable[[str], Any]") -> "Callable[[str], Any]":
            def parse(text: str) -> "Any":
                try:
                    return read(text)
                except ValueError as error:
                    raise argparse.ArgumentTypeError(f"{text!r} {error}") from None

            return parse

        parser = argparse.ArgumentParser(
            prog="python -m popcon",
            description="Tell which installed libraries are really used, and nothing about who uses them.",
        )
        commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
        commands.add_parser(
            "selftest",
            help="prove that reporting works here, and say what is in force",
            description="Prove that reporting works here, and say what is in force. Exit status 1 if something is an error.",
        )
        command = commands.add_parser(
            "install",
            help="let every IPython and Jupyter session of this environment report",
            description="Let every IPython and Jupyter session of this environment report, or with --all-processes every process.",
        )
        command.add_argument(
            "--all-processes", action="store_true", help="every Python process of this environment reports"
        )
        command.add_argument(
            "--vendor", action="store_true", help="copy popcon.py into site-packages first, if it is needed"
        )
        commands.add_parser(
            "uninstall", help="remove what install wrote", description="Remove what install wrote, and only that."
        )
        asking = commands.add_parser(
            "usage",
            help="tell how much each installed library is used, and which can go",
            description="Tell how much each library installed here is used, from the counts that the site has collected, and "
            "which can go. Nothing is changed, here or on any server. Exit status 1 if there is no sound answer.",
        )
        source = asking.add_mutually_exclusive_group(required=True)
        source.add_argument(
            "--prometheus",
            type=checked(_url),
            metavar="URL",
            help="where Prometheus is, such as http://prometheus:9090",
        )
        source.add_argument(
            "--metrics", metavar="FILE_OR_URL", help="statsd_exporter's own /metrics, or a file with them"
        )
        asking.add_argument(
            "--window",
            type=checked(seconds),
            default="90d",
            metavar="DURATION",
            help="time up to now that counts, such as 30d (default: 90d)",
        )
        asking.add_argument(
            "--match",
            default="{}",
            type=checked(_matchers),
            metavar="'{...}'",
            help="""labels that count: '{namespace="prod"}'""",
        )
        asking.add_argument(
            "--keep",
            nargs="+",
            action="extend",
            default=[],
            metavar="NAME",
            help="libraries that stay, by name or glob",
        )
        asking.add_argument(
            "--metric", default="", help="name of the counters, if README's mapping rules do not make it"
        )
        asking.add_argument(
            "--header",
            action="append",
            default=[],
            help=f"for a guarded server, 'Authorization: Bearer ...'; better in {HEADER}",
        )
        asking.add_argument(
            "--at-least", type=int, default=0, metavar="K", help="show counts below K as <K, to publish the table"
        )
        shape = asking.add_mutually_exclusive_group()
        shape.add_argument("--unused", action="store_true", help="print only the names that can go, for pip uninstall")
        shape.add_argument("--json", action="store_true", help="print all as JSON")
        command = commands.add_parser(
            "run",
            help="run a program, and say what would be sent at its end",
            usage="python -m popcon run [-h] [--explain] (SCRIPT | -m MODULE | -c CODE | -) [ARGS ...]",
            description="Run a program as python would, and say on stderr at its end what would be sent, by its own process. Nothing is.",
        )
        command.add_argument(
            "--explain", action="store_true", help="say of each new module whose it is, or why it is not counted"
        )
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        if arguments[:1] == ["run"]:
            # What follows is the program's: argparse would look for options of ours in it.
            explain = arguments[1:2] == ["--explain"]
            program = arguments[1 + explain :]
            if not program or program in (["-c"], ["-m"]):
                command.error("a program is missing: SCRIPT, -m MODULE or -c CODE")
            option = program[0]
            if option[:2] in ("-c", "-m") or option == "-" or not option.startswith("-"):
                run(program, explain)
                return 0
            if option[1] in "bBdEiIOPqsSuvVWxX":
                option = " ".join(program[:2]) if option in ("-W", "-X") else option
                command.error(f"{option} is for python itself: python {option} -m popcon run ...")
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            (command if options.command == "run" else parser).error(f"unknown option {unknown[0]}")
        if not options.command:
            parser.error(f"a command is missing: {', '.join(commands.choices)}; -h tells what they do")
        stdout = sys.stdout if isinstance(sys.stdout, standard("io").TextIOWrapper) else None
        if stdout:
            stdout.reconfigure(errors="backslashreplace")  # a path may hold what the encoding does not
        try:
            if options.command == "install":
                status = one_at_a_time(lambda: install(options.all_processes, options.vendor))
            elif options.command == "usage":
                if options.match and options.metrics:
                    asking.error("--match is for --prometheus; an exporter's metrics are taken as they are")
                status = usage(options)
            else:
                status = one_at_a_time(uninstall) if options.command == "uninstall" else selftest()
            print(end="", flush=True)
        except KeyboardInterrupt:
            status = 130  # as the shell says it
        except OSError as error:
            # Nothing more can be written: who reads it is gone, as with `| head -1`, or a disk is full.
            if not isinstance(error, BrokenPipeError):
                print(f"popcon: {error}", file=sys.stderr)
            if stdout:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # for Python writes the rest at exit
            status = 1
        return status


if __name__ == "__main__":
    sys.exit(main())
