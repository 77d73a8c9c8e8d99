#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""popcon: which installed libraries do people really use, and which does nobody?

When a Python process ends, and after each cell of IPython, popcon works out which
installed libraries were imported in it, and adds one to a global counter for each,
over the statsd protocol. UDP datagrams like this one are all that the server gets:

    python_popcon.library_used.numpy:1|c
    python_popcon.library_used.pandas:1|c

They hold no user, process, time or file name. A person's own code is named only if it
is installed as a package, by pip for instance, and not as an editable install.

To switch it on, run 'python popcon.py install', or write at the top of a script
'import popcon; popcon.setup_reporter()'. Then set the host. To switch it off, leave
the host empty, set DO_NOT_TRACK=1, or run 'python -m popcon uninstall'.

    PYTHON_POPCONTEST_STATSD_HOST         name or address; without it, nothing is sent
    PYTHON_POPCONTEST_STATSD_PORT         default 9125
    PYTHON_POPCONTEST_STATSD_PREFIX       default python_popcon.library_used
    PYTHON_POPCONTEST_STATSD_SAMPLE_RATE  share of processes that report; default 1
    PYTHON_POPCONTEST_SIGTERM             1: report when SIGTERM ends the process, too
    PYTHON_POPCONTEST_DEBUG               1: say on stderr what was sent, or why nothing
    DO_NOT_TRACK                          set, and not 0: nothing is ever sent

The file follows the data: from sys.modules to the files that were executed, to the
libraries that own them, to datagrams. Then comes the reporter, which decides when. All
of that runs in people's processes. What stands below the line 'the command line' is
only called if somebody types a command.
"""

# This stays before the imports: if a shell runs this file by mistake, it stops here,
# since to a shell the parenthesis of this tuple is a syntax error. So it never runs
# 'import', which is a program on some systems (ImageMagick's).
__all__ = ("report", "setup_reporter", "used_libraries")
__version__ = "3.0.0"

# These are loaded at start, or built into Python, so importing them costs nothing.
import _signal  # type: ignore[import-not-found]
import atexit
import os
import sys
import time

if sys.hexversion < 0x030A0000:
    if __name__ == "__main__":
        sys.exit("popcon needs Python 3.10 or later")
    raise ImportError("popcon needs Python 3.10 or later")

# Taken now: gevent replaces some of these later, and sandboxes put None for os.kill.
from _frozen_importlib import BuiltinImporter, ModuleSpec, module_from_spec
from _frozen_importlib_external import (
    FileFinder,
    PathFinder,
    SourceFileLoader,
    SourcelessFileLoader,
)
from _thread import allocate_lock, get_ident
from os import getpid, kill

# Only type checkers read this: importing typing takes longer than all of popcon.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, NoReturn

    # Relative to an entry of sys.path, as in RECORD, or names of modules without a file
    Paths = Iterable[str]
    Answers = Iterator[tuple[str, Paths]]  # a library, and paths that it owns


# ---- sys.modules -> the files that were executed ------------------------------------

ModuleType = type(sys)
# Descriptors that read the real namespace of a module or a class, even if its __dict__
# is overridden.
MODULE_NAMESPACE = vars(ModuleType)["__dict__"]
CLASS_NAMESPACE = vars(type)["__dict__"]
FunctionType = type(lambda: None)

# Modules that Python runs at its start. _distutils_hack belongs to setuptools, whose
# .pth file loads it in every process.
START_UP = {"sitecustomize", "usercustomize", "_distutils_hack"}
# Top-level names that say nothing about a library. No RECORD lists a popcon.py that was
# copied into site-packages, so all would be read in search of its owner.
IGNORED_NAMES = sys.stdlib_module_names | START_UP | {"popcon"}
# These folders hold the standard modules that are not in that set, such as
# _sysconfigdata_*. In a frozen program os may have no file.
STANDARD_LIBRARY = os.path.dirname(getattr(os, "__file__", os.sep))
STANDARD_FOLDERS = (
    STANDARD_LIBRARY,
    os.path.join(STANDARD_LIBRARY, "lib-dynload"),
    os.path.join(sys.base_prefix, "DLLs"),
)


def executed_files(modules: "Mapping[Any, object]") -> "set[str]":
    """Return the files of the modules that were executed.

    The standard library's are left out, and so are lazy modules, which are executed
    only when somebody uses them. If a top-level module has no file, since a custom
    loader made it, its name is returned instead.
    """
    # () if there are no lazy modules: issubclass(x, ()) is False.
    util = namespace_of(sys.modules.get("importlib.util"))
    lazy_module = util.get("_LazyModule", ())
    files = set()
    for name, module in modules.items():
        if type(name) is not str or name.partition(".")[0] in IGNORED_NAMES:
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
    """Return the path of an executed module's file.

    If it is a top-level module that a custom loader made without a file, its name is
    returned instead. None is returned for all others: modules that were not executed,
    scripts, and what has no real path.

    Raises UnicodeEncodeError for a path that no file can have.
    """
    namespace = namespace_of(module)
    spec = namespace.get("__spec__")
    file = namespace.get("__file__")
    if type(spec) is ModuleSpec:
        if not was_executed(spec, namespace):
            return None
        # The spec is more reliable: some modules change their __file__, as tlz does.
        # But others have a __file__ of their own and the spec of another module, which
        # has another name. "is" runs no foreign code, as "==" could.
        if spec.has_location and (file is None or spec.name is name):
            file = spec.origin
        if file is None and "." not in name and has_custom_loader(spec):
            return name
    elif name in ("__main__", "__mp_main__"):
        return None  # a script is a person's own; what "python -m" runs has a spec
    elif file is None and "." not in name:
        # Perhaps the module has put another object in its own place, as sh does. A
        # stub that a test has put there is defined in another module, so nothing is
        # found.
        file = namespace_behind(name, module).get("__file__")
    if type(file) is not str or os.sep not in file:
        return None  # "<string>", for instance
    os.fsencode(file)  # raises UnicodeEncodeError
    return file


def namespace_of(module: object) -> "dict[str, Any]":
    """Return the namespace of a module, an empty one for any other object.

    What is in sys.modules may be lazy, or an object of somebody's own. So this runs
    no code of it, which getattr(), isinstance() and vars() could do.
    """
    if not issubclass(type(module), ModuleType):
        return {}
    # None if it was never initialized.
    return MODULE_NAMESPACE.__get__(module) or {}


def namespace_behind(name: str, item: "Any") -> "dict[str, Any]":
    """Return the namespace of the module that defines an object.

    name: of that module; if another one defines the object, the namespace is empty
    item: a function, or a class, or an object whose class has functions of its own

    Runs no code of the object.
    """
    functions: Iterable[Any] = [item]
    if type(item) is not FunctionType:
        if not issubclass(type(item), type):
            item = type(item)
        functions = CLASS_NAMESPACE.__get__(item).values()
    for function in functions:
        if type(function) in (classmethod, staticmethod):
            function = function.__func__
        if type(function) is FunctionType:
            namespace: dict[str, Any] = function.__globals__
            found = namespace.get("__name__")
            if type(found) is str and found == name:
                return namespace
    return {}


def was_executed(spec: "ModuleSpec", namespace: "dict[str, Any]") -> bool:
    """Tell whether a module was executed, and not merely created from its source.

    The *-nspkg.pth files of older namespace packages do the latter. If a module was
    executed, exec() has added __builtins__ to its namespace. What a module has put in
    its own place, as transformers does, lacks that, but has the spec of that module, to
    which import has added _initializing.
    """
    if type(spec.loader) not in (SourceFileLoader, SourcelessFileLoader):
        return True
    return "__builtins__" in namespace or hasattr(spec, "_initializing")


def has_custom_loader(spec: "ModuleSpec") -> bool:
    """Tell whether a module has a loader, and none of those that look in folders."""
    kind = type(spec.loader)
    return spec.loader is not None and kind.__module__ != "_frozen_importlib_external"


# ---- files -> the libraries that own them -------------------------------------------

METADATA_SUFFIXES = (".dist-info", ".egg-info", "EGG-INFO")
# Folders whose names end like this may hold libraries without a RECORD. In any other,
# metadata without a RECORD belong to somebody's own source tree.
LIBRARY_FOLDERS = ("site-packages", "dist-packages", ".egg")
READ_LIMIT = 64 << 20  # bytes of a file; no RECORD in use comes near it


def owners(new: "set[str]", earlier: "Iterable[str]" = ()) -> "dict[str, set[str]]":
    """Map libraries to those of the files that they own.

    new: files whose owners are looked for, as executed_files() returns them, so with
        names of modules that have no file
    earlier: files of the baseline. What is read for the new files tells the owners of
        some of these, too, and they are returned as well.

    The ways to ask below are tried in turn. The first one that knows a file settles its
    owners, and may name several.
    """
    found: dict[str, set[str]] = {}
    unowned = new.union(earlier)
    for entry in path_entries(new):
        file_of = paths_below(entry.path, unowned)
        # In order of trust and cost. Each is asked only for what is left over.
        for ask in (
            entry.ask_namesakes,
            entry.ask_namespaces,
            entry.ask_lookalikes,
            entry.ask_all_others,
            entry.ask_package_managers,
            entry.ask_names,
        ):
            new_paths = {path for path in file_of if file_of[path] in new}
            if not new_paths:
                break
            for library, paths in answers(ask, file_of, new_paths):
                files = {file_of[path] for path in paths}
                found.setdefault(library, set()).update(files)
                unowned -= files
            file_of = {path: file for path, file in file_of.items() if file in unowned}
    names = {name for name in unowned if os.sep not in name}  # of modules without file
    for library, owned in answers(ask_packages_distributions, names, names & new):
        found.setdefault(library, set()).update(owned)
    found.pop("", None)  # an editable install, or a library without a valid name
    return found


def answers(
    ask: "Callable[[Paths, Paths], Answers]", paths: "Paths", wanted: "Paths"
) -> "list[tuple[str, Paths]]":
    """Ask about the owners of paths, and return nothing if that fails."""
    try:
        return list(ask(paths, wanted))
    except Exception as error:
        debug(f"cannot tell who owns {list(wanted)[:3]} and others: {error!r}")
        return []


def path_entries(files: "Iterable[str]") -> "list[PathEntry]":
    """Return the folders that hold libraries, with their metadata, above the files.

    Outer ones come first since a library owns the libraries that it brings along in a
    folder of its own, even if it puts that folder on sys.path.
    """
    above: set[str] = set()
    for file in files:
        folder = file.rpartition(os.sep)[0]
        while folder and folder not in above:
            above.add(folder)
            folder = folder.rpartition(os.sep)[0]
    metadata: dict[str, set[str]] = {}
    finders: dict[str, Any] = dict(sys.path_importer_cache)
    for name, finder in finders.items():
        if not issubclass(type(finder), FileFinder):
            continue  # a zip archive, or a folder that is not there
        try:
            # The path in full, if it is relative on sys.path.
            path = finder.path.rstrip(os.sep)
            if path in above:
                metadata[path] = metadata_in(path, finder)
        except Exception as error:
            debug(f"cannot tell what is installed in {name}: {error!r}")
    for path in above.difference(metadata):
        # Somebody may have emptied sys.path_importer_cache.
        if path.endswith(LIBRARY_FOLDERS):
            try:
                metadata[path] = metadata_among(os.listdir(path), path)
            except OSError as error:
                debug(f"cannot tell what is installed: {error}")
    entries = [PathEntry(path, infos) for path, infos in metadata.items() if infos]
    return sorted(entries, key=lambda entry: len(entry.path))


def metadata_in(path: str, finder: "Any") -> "set[str]":
    """Return the names of the metadata in the folder that a finder has listed.

    If there are libraries, and the folder has changed since, it is listed anew: one may
    have been upgraded. The finder's own cache stays as it is: imports rely on it.
    """
    infos = metadata_among(finder._path_cache, path)
    has_libraries = infos or path.endswith(LIBRARY_FOLDERS)
    if has_libraries and os.stat(path).st_mtime != finder._path_mtime:
        return metadata_among(os.listdir(path), path)
    return infos


def metadata_among(names: "Iterable[str]", folder: str) -> "set[str]":
    """Return those names in a folder that are metadata of libraries.

    A person's own folder may hold thousands of names, so they are looked at only once.
    """
    suffixes: tuple[str, ...] = (".dist-info",)  # an .egg-info has no RECORD
    if folder.endswith(LIBRARY_FOLDERS):
        suffixes = METADATA_SUFFIXES
    return {name for name in names if name.endswith(suffixes)}


def paths_below(folder: str, files: "Iterable[str]") -> "dict[str, str]":
    """Map paths relative to the folder, as in RECORD, to the files below it."""
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

    unread: distributions whose RECORD has not been read yet
    without_record: distributions that turned out to have none
    """

    def __init__(self, path: str, infos: "Iterable[str]") -> None:
        self.path = path
        self.unread = {Distribution(path, info) for info in infos}
        self.without_record: list[Distribution] = []

    # Ways to ask for owners. Each yields libraries, and which of the paths they own.
    #
    # paths: of all modules that are still without an owner
    # wanted: the new ones among them; only these decide which RECORDs are read

    def ask_namesakes(self, paths: "Paths", wanted: "Paths") -> "Answers":
        """Read the RECORDs of distributions that are called like a module.

        Names come first because reading all RECORDs may take seconds on a network file
        system.
        """
        return self.ask_named(top_levels(wanted), paths, wanted)

    def ask_namespaces(self, paths: "Paths", wanted: "Paths") -> "Answers":
        """Read the RECORDs of distributions that are called like a part of a package.

        So azure-storage-blob is called like azure/storage/blob, and protobuf like a
        part of google/protobuf. Otherwise those of all azure-* would be read.
        """
        names = set()
        for path in wanted:
            parts = path.partition(".")[0].split("/")
            names.update(parts[1:3])
            names.add("".join(parts[:2]))
            names.add("".join(parts[:3]))
        return self.ask_named(names, paths, wanted)

    def ask_named(
        self, names: "Iterable[str]", paths: "Paths", wanted: "Paths"
    ) -> "Answers":
        """Read the RECORDs of distributions with these names, however spelled."""
        short_names = set(map(squeezed, names))
        likely = {one for one in self.unread if one.short_name in short_names}
        return self.ask_records(likely, paths, wanted)

    def ask_lookalikes(self, paths: "Paths", wanted: "Paths") -> "Answers":
        """Read the RECORDs of distributions whose name resembles that of a module.

        So python-dateutil resembles dateutil, and scikit-learn resembles sklearn. The
        first word is enough: matplotlib resembles mpl_toolkits.
        """
        tops = top_levels(wanted)
        first_words = {squeezed(top.strip("_").partition("_")[0]) for top in tops}
        text = squeezed(" ".join(tops))
        likely = set()
        for one in self.unread:
            name = one.short_name
            if name in text or any(has_letters(name, word) for word in first_words):
                likely.add(one)
        return self.ask_records(likely, paths, wanted)

    def ask_all_others(self, paths: "Paths", wanted: "Paths") -> "Answers":
        """Read the RECORDs that have not been read so far."""
        return self.ask_records(self.unread, paths, wanted)

    def ask_records(
        self, distributions: "set[Distribution]", paths: "Paths", wanted: "Paths"
    ) -> "Answers":
        """Read RECORDs (PEP 376), and yield the libraries that list some paths."""
        self.unread = self.unread - distributions  # not "-=": they may be the same set
        tops = tuple(map(os.fsencode, top_levels(wanted)))
        for distribution in distributions:
            record = distribution.read("RECORD")
            if not record:
                if self.path.endswith(LIBRARY_FOLDERS):
                    self.without_record.append(distribution)
                continue
            # If tops are many, to search for each takes longer than to parse.
            if len(tops) < 6 and not may_list(record, tops):
                continue
            listed = listed_paths(decoded(record)).intersection(paths)
            if listed:
                yield distribution.name(), listed

    def ask_package_managers(self, paths: "Paths", wanted: "Paths") -> "Answers":
        """Read the lists of files that dpkg and conda keep of their packages.

        Debian leaves out most RECORDs, and conda some. There a library owns what is in
        the same package as its metadata.
        """
        below_prefix = self.path.removeprefix(sys.prefix + os.sep)
        for lists_folder, start, folder in (
            ("/var/lib/dpkg/info/", "python3-", self.path),
            (f"{sys.prefix}/conda-meta/", "", below_prefix.replace(os.sep, "/")),
        ):
            if self.without_record and os.path.isdir(lists_folder):
                paths_in_lists = {f"{folder}/{path}" for path in paths}
                for name in os.listdir(lists_folder):
                    if name.startswith(start) and name.endswith((".list", ".json")):
                        # One path per line; conda's are strings in JSON.
                        text = text_of(lists_folder + name).replace('"', "\n")
                        lines = set(text.split("\n"))
                        listed = lines.intersection(paths_in_lists)
                        if listed:
                            yield from self.in_package(lines, folder, listed)

    def in_package(
        self, lines: "set[str]", folder: str, listed: "set[str]"
    ) -> "Answers":
        """Yield the libraries whose metadata are in a package, with paths in it."""
        start = f"{folder}/"
        infos = {line.removeprefix(start).partition("/")[0] for line in lines}
        for distribution in self.without_record:
            if distribution.info in infos:
                yield distribution.name(), {path.removeprefix(start) for path in listed}

    def ask_names(self, paths: "Paths", wanted: "Paths") -> "Answers":
        """Look at top-level names alone, for libraries without a RECORD."""
        libraries_of: dict[str, list[str]] = {}
        for distribution in self.without_record:
            library = distribution.name()
            text = decoded(distribution.read("top_level.txt"))
            guess = [library.partition("-")[0], library.replace("-", "_")]
            for top in text.split() or guess:
                libraries_of.setdefault(top.lower(), []).append(library)
        for path in paths:
            stem = path.partition(".")[0]
            candidates = libraries_of.get(stem.partition("/")[0].lower(), [])
            # Many may share a top-level package. Then google-auth owns google/auth.
            text = squeezed(stem.replace("/", ""))
            contained = [library for library in candidates if squeezed(library) in text]
            if contained:
                candidates = [max(contained, key=len)]
            for library in candidates:
                yield library, [path]


def ask_packages_distributions(modules: "Paths", wanted: "Paths") -> "Answers":
    """Ask importlib.metadata, which is slow, who owns modules without a file.

    This is done only if sys.meta_path has a finder of distributions besides Python's
    own and that of the backport importlib_metadata. These two look in folders, and so
    did the other ways to ask. Any other finder of distributions has loaded
    importlib.metadata already.
    """
    metadata = sys.modules.get("importlib.metadata")
    if not wanted or metadata is None:
        return
    finders = set()
    for finder in sys.meta_path:
        if hasattr(finder, "find_distributions"):
            finders.add(getattr(finder, "__name__", type(finder).__name__))
    if finders - {"PathFinder", "MetadataPathFinder"}:
        libraries = metadata.packages_distributions()
        for module in modules:
            for name in libraries.get(module, ()):
                yield normalized(name), [module]


def top_levels(paths: "Iterable[str]") -> "set[str]":
    """Return the names of top-level modules and packages, such as six for six.py."""
    return {path.partition("/")[0].partition(".")[0] for path in paths}


def may_list(record: bytes, tops: "tuple[bytes, ...]") -> bool:
    """Tell whether a RECORD may list paths that begin like these."""
    if record.startswith(tops) or b'"' in record:
        return True  # in quotes, a path does not begin its line
    return any(b"\n" + top in record for top in tops)


def has_letters(name: str, word: str) -> bool:
    """Tell whether a name has all letters of a word, in the same order."""
    if word in name:
        return True
    if name[:1] != word[:1]:
        return False  # that would be far-fetched
    rest = iter(name)  # "in" takes the letters up to the one that it finds
    return all(letter in rest for letter in word)


def listed_paths(record: str) -> "set[str]":
    """Return the paths that a RECORD lists: the first field of each line, as in CSV."""
    lines = record.split("\n")
    paths = {line.partition(",")[0] for line in lines}
    if '"' in record:
        for line in lines:
            if line.startswith('"'):
                path = line[1:].partition('",')[0]
                paths.add(path.replace('""', '"'))
    return paths


class Distribution:
    """An installed library, as its .dist-info (PEP 376) or .egg-info describes it."""

    def __init__(self, folder: str, info: str) -> None:
        self.folder = folder
        self.info = info
        stem = info.removesuffix(".egg-info")  # there may be no version: foo.egg-info
        self.short_name = squeezed(stem.partition("-")[0])

    def read(self, *names: str) -> bytes:
        """Return the content of a metadata file, nothing if it cannot be read.

        Without a name it reads the .egg-info itself, which may be a file.
        """
        return read(os.sep.join([self.folder, self.info, *names]))

    def header(self) -> "list[str]":
        """Return the lines of the metadata above the description."""
        content = self.read("METADATA") or self.read("PKG-INFO") or self.read()
        header, _, _ = decoded(content).lstrip().partition("\n\n")
        return header.split("\n")

    def name(self) -> str:
        """Return the normalized name, "" if that is invalid.

        It is "" as well if the install is editable (PEP 610).
        """
        url = b"".join(self.read("direct_url.json").split())
        if b'"editable":true' in url:
            return ""
        return normalized(self.field("name"))

    def field(self, name: str) -> str:
        """Return the value of the first field with this name, "" if there is none."""
        for line in self.header():
            key, _, value = line.partition(":")
            if key.lower() == name:
                return value
        return ""

    def requirements(self) -> "list[str]":
        """Return what it requires (PEP 508) on any system, without its extras."""
        names = []
        for line in self.header():
            field, _, name = line.partition(": ")
            if field == "Requires-Dist" and "extra" not in name.partition(";")[2]:
                for end in " [(<>=!~;":
                    name = name.partition(end)[0]
                names.append(normalized(name))
        return names


def normalized(name: str) -> str:
    """Return a name as PEP 503 normalizes it, "" if it is not valid, or too long."""
    name = name.strip()
    if not is_plain(name, "-_.") or len(name) > 200:
        return ""
    words = name.lower().replace("_", "-").replace(".", "-").split("-")
    return "-".join(filter(None, words))


def is_plain(text: str, others: str) -> bool:
    """Tell whether a text has ASCII letters or digits, and else only these others."""
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
    """Return the text, decoded as Python decodes names of files, without "\\r"."""
    text = content.decode(sys.getfilesystemencoding(), "surrogateescape")
    return text.replace("\r", "")


def text_of(path: str) -> str:
    """Return the text in a file, nothing if it cannot be read."""
    return decoded(read(path))


# ---- settings -----------------------------------------------------------------------

# Environment variables, named as those of PyPI's popularity-contest, which popcon
# replaces.
HOST = "PYTHON_POPCONTEST_STATSD_HOST"
PORT = "PYTHON_POPCONTEST_STATSD_PORT"
PREFIX = "PYTHON_POPCONTEST_STATSD_PREFIX"
SAMPLE_RATE = "PYTHON_POPCONTEST_STATSD_SAMPLE_RATE"
SIGTERM_SWITCH = "PYTHON_POPCONTEST_SIGTERM"
DEBUG_SWITCH = "PYTHON_POPCONTEST_DEBUG"


def is_host(text: str) -> bool:
    labels = text.removesuffix(".").split(".")
    has_port = text.count(":") == 1
    longest = max(map(len, labels))  # RFC 1035 allows 63
    is_name = is_plain(text, ".:%-_") and all(labels)
    return is_name and longest < 64 and not has_port


def is_port(text: str) -> bool:
    return is_number(text) and len(text) < 6 and 0 < int(text) < 65536


def is_prefix(text: str) -> bool:
    return is_plain(text, ".-_") and len(text) <= 1000 and all(text.split("."))


def is_sample_rate(text: str) -> bool:
    digits = text.replace(".", "", 1)
    return is_number(digits) and len(text) < 20 and 0 < float(text) <= 1


def is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


# For each: its default, a function that validates a value, and what is valid, in words.
SETTINGS: "dict[str, tuple[str, Callable[[str], bool], str]]" = {
    HOST: (
        "",
        is_host,
        "a name or an address, without a port: statsd.example, 10.0.0.3 or ::1",
    ),
    PORT: ("9125", is_port, "a whole number from 1 to 65535, such as 9125"),
    PREFIX: (
        "python_popcon.library_used",
        is_prefix,
        "at most 1000 of A-Z a-z 0-9 _ - with dots between, such as "
        "python_popcon.library_used",
    ),
    SAMPLE_RATE: ("1", is_sample_rate, "a number above 0 and up to 1, such as 0.1"),
}


def setting(name: str) -> str:
    """Return the value in force of one of SETTINGS. Raises ValueError if invalid."""
    default, is_right, words = SETTINGS[name]
    text = os.environ.get(name) or default
    if text and not is_right(text):
        raise ValueError(f"{name}={text!r}: must be {words}")
    return text


def is_on(name: str) -> bool:
    """Tell whether a switch is on: it is set, not to 0, and not empty."""
    return os.environ.get(name, "0") not in ("", "0")


def opted_out() -> bool:
    """Tell whether DO_NOT_TRACK is set to anything but 0 (consoledonottrack.com).

    That may be an empty value.
    """
    return os.environ.get("DO_NOT_TRACK", "0") != "0"


def debug(message: str) -> None:
    """Write a message to stderr, in one line, if PYTHON_POPCONTEST_DEBUG is on.

    It goes straight to the descriptor. If that is closed or full, print() would leave
    text in a buffer, and Python would end with status 120 since it cannot write it.
    """
    try:
        if is_on(DEBUG_SWITCH):
            line = f"popcon: {' '.join(message.split())}\n"
            content = line.encode("utf-8", "backslashreplace")
            os.write(sys.stderr.fileno(), content)
    except Exception:
        pass  # there is no stderr, or it or os.environ is an object of somebody's own


# ---- libraries -> statsd lines -> datagrams -> socket -------------------------------

# Bytes: the smallest IPv6 MTU, 1280, less the headers of IPv6 and UDP. Any line fits,
# as prefixes, names and sample rates have at most 1000, 200 and 20 characters.
DATAGRAM = 1232
PATIENCE = 1.0  # seconds that a name server, or another thread, may hold up a report
PAUSE = 600.0  # seconds without a look-up of the host after a slow one that failed
LONG_AGO = float("-inf")  # time.monotonic() may be below 0: tests set it to any time
NAME_SERVER_PORT = 53


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

    Raises OSError if no address of the host takes them, or if a name server is silent.
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
    """Return what getaddrinfo() finds. Raises OSError.

    IPv4 comes first: many servers listen on nothing else, and with UDP the sender is
    not told that nobody listens. IPv6 is looked up only where there is no IPv4: some
    name servers never answer about it.
    """
    socket = standard_socket()

    def addresses(family: int) -> "list[tuple[Any, ...]]":
        # As bytes: for a str it would import the codec idna, whose file may be gone.
        name = host.encode("ascii")
        return list(socket.getaddrinfo(name, port, family, socket.SOCK_DGRAM))

    # With a colon it can only be an address, even if it is a wrong one.
    if ":" in host or is_address(host) or is_in_hosts_file(host):
        # AF_INET is a smaller number than AF_INET6.
        return sorted(addresses(socket.AF_UNSPEC), key=lambda found: found[0])
    await_name_server(host, TYPE_A)
    try:
        return addresses(socket.AF_INET)
    except OSError:
        await_name_server(host, TYPE_AAAA)
        return addresses(socket.AF_INET6)


def is_address(text: str) -> bool:
    """Tell whether a text is an IPv4 or IPv6 address, perhaps with a scope (%eth0)."""
    socket = standard_socket()
    try:
        if ":" in text:
            socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
        else:
            socket.inet_aton(text)
    except OSError:
        return False
    return True


def is_in_hosts_file(host: str) -> bool:
    for line in text_of("/etc/hosts").lower().split("\n"):
        words = line.partition("#")[0].split()
        if host.lower() in words[1:] and is_address(words[0]):
            return True
    return False


def standard_socket() -> "Any":
    """Return the module _socket, and load the standard library's if none is loaded.

    The module socket takes long to import, and gevent may have replaced parts of it. A
    plain import might find a file of that name in a person's folder.
    """
    if "_socket" not in sys.modules:
        spec: Any = BuiltinImporter.find_spec("_socket")
        # With PYTHONHOME, it may lie in a folder that only sys.path names.
        folders = list(STANDARD_FOLDERS)
        for path in sys.path:
            if type(path) is str and path.endswith("lib-dynload"):
                folders.append(path)
        spec = spec or PathFinder.find_spec("_socket", folders)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["_socket"] = module
    return sys.modules["_socket"]


# Types of records (RFC 1035, RFC 3596)
TYPE_A = b"\0\1"
TYPE_AAAA = b"\0\x1c"
# Codes of answers after which getaddrinfo() asks the next name server (RFC 1035)
SERVER_FAILURE = 2
NOT_IMPLEMENTED = 4
REFUSED = 5


def await_name_server(host: str, record_type: bytes) -> None:
    """Raise OSError if getaddrinfo() would wait for a name server beyond PATIENCE.

    getaddrinfo() cannot be interrupted. So the name servers are asked what it will ask,
    in much the same order, until it would ask no more. The answers are not used.
    """
    deadline = time.monotonic() + PATIENCE
    resolv_conf = text_of("/etc/resolv.conf").split("\n")
    queries: list[bytes] = []
    for name in names_to_look_up(host, resolv_conf):
        queries.append(dns_query(len(queries), name, record_type))
    for server in name_servers(resolv_conf):
        try:
            if gives_final_answer(queries, server, deadline):
                return
        except TimeoutError:
            message = f"the name server {server} took more than {PATIENCE:g} s"
            raise OSError(f"{host}: {message}") from None
        except OSError:
            pass  # it cannot be reached, so getaddrinfo() will ask the next one as well


def gives_final_answer(
    queries: "Iterable[bytes]", server: str, deadline: float
) -> bool:
    """Ask a name server, and tell whether getaddrinfo() will take its answer.

    If not, it will ask the next one.

    queries: in the order of getaddrinfo(), which stops at a name that has records
    deadline: on time.monotonic()

    Raises TimeoutError after the deadline, OSError if the server cannot be reached.
    """
    socket = standard_socket()
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    udp = socket.socket(family, socket.SOCK_DGRAM)
    try:
        udp.connect((server, NAME_SERVER_PORT))
        for query in queries:
            udp.send(query)
            answer = b""
            # An answer has at least 12 bytes, and begins with the number of its query.
            while len(answer) < 12 or answer[:2] != query[:2]:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError
                udp.settimeout(remaining)
                answer = udp.recv(512)
            if any(answer[6:8]):  # the count of records
                return True
            if answer[3] % 16 in (SERVER_FAILURE, NOT_IMPLEMENTED, REFUSED):
                return False
        return True
    finally:
        udp.close()


def name_servers(resolv_conf: "Iterable[str]") -> "list[str]":
    """Return the addresses of the name servers in the lines of resolv.conf(5)."""
    found = []
    for line in resolv_conf:
        words = line.split()
        if line.startswith("nameserver") and len(words) > 1 and is_address(words[1]):
            found.append(words[1])
    # The system takes no more than three, and this machine if there is none.
    return found[:3] or ["127.0.0.1"]


def names_to_look_up(host: str, resolv_conf: "Iterable[str]") -> "list[str]":
    """Return the names that may be the host's, in the order of resolv.conf(5)."""
    if host.endswith("."):
        return [host]
    domains = []
    ndots = 1
    for line in resolv_conf:
        words = line.split()
        if line.startswith(("search", "domain")):
            domains = words[1:]
        elif line.startswith("options"):
            for word in words:
                number = word.removeprefix("ndots:")
                if number != word and is_number(number):
                    ndots = int(number)
    names = [f"{host}.{domain}".rstrip(".") for domain in domains]
    if host.count(".") < ndots:
        names.append(host)
    else:
        names.insert(0, host)
    return list(dict.fromkeys(names))  # "search ." adds the name itself


def dns_query(number: int, name: str, record_type: bytes) -> bytes:
    """Return the message that asks for the records of a name (RFC 1035)."""
    message = number.to_bytes(2, "big")  # the answer begins with it, too
    message += b"\1\0"  # a standard query, recursion desired
    message += b"\0\1\0\0\0\0\0\0"  # one question, and nothing else
    for label in name.encode().split(b"."):
        if label:
            message += bytes([len(label)]) + label
    return message + b"\0" + record_type + b"\0\1"  # the end of the name; class IN


# ---- the reporter -------------------------------------------------------------------

# The name of a module that is always loaded. begin_in_child() moves it to the end of
# sys.modules, as a mark: what the parent has loaded stands before it then, and what the
# child loads, behind it.
FORK_MARK = "atexit"


class Reporter:
    """What one process has loaded, used and sent, and when it reports.

    The baseline is the set of files that were executed before the reporter was set up,
    or before this process was forked. A library counts as used if files of it were
    executed, and none of them is in the baseline.
    """

    def __init__(self) -> None:
        self.is_set_up = False
        self.sigterm_handler: object = None  # set if SIGTERM reports
        self.forking: set[int] = set()  # threads that hold SIGTERM back
        self.shell: object = None  # the IPython shell that it reports for
        self.shell_libraries: set[str] = set()  # what that requires
        self.begin_process(set())  # until set_up(), all that is loaded counts

    def begin_process(self, baseline: "set[str] | None" = None) -> None:
        """Begin for a process in which nothing was used or sent yet."""
        self.lock = allocate_lock()  # held during a report
        self.sigterm_came = False  # during a report, which raises it again at its end
        self.has_finalizer = False  # of multiprocessing, for the end of a worker
        self.sent: set[str] = set()  # libraries
        self.no_look_up_before = LONG_AGO  # on time.monotonic()
        self.begin_baseline(baseline)
        # From 0 to below 1; the process reports if this is below the sample rate.
        self.draw = int.from_bytes(os.urandom(6), "big") / 2**48

    def begin_baseline(self, files: "set[str] | None") -> None:
        """Make these files the baseline. What was sent stays sent.

        files: None in a forked child, whose baseline is found out later. To look at all
        modules there would copy many pages of memory, as that changes their reference
        counts.
        """
        self.mark = modules_mark()  # as it was at the last report, or is now
        self.baseline = files
        self.seen: set[str] = set()  # files beyond the baseline that were looked up
        self.used: set[str] = set()  # libraries

    def set_up(self) -> None:
        """Take the baseline, and arrange for reports, at the first call.

        A later call does something only if an IPython session has begun since: what the
        session needed for itself becomes baseline, too.

        In a session the baseline ends where the shell was made. What was loaded after
        that counts, even if it was before the first call: extensions in IPython's
        settings, start-up files, earlier cells. So does matplotlib, if the settings
        name it.
        """
        shell = ipython_shell()
        is_new_session = shell is not None and shell is not self.shell
        # What a session needs for itself ends with the later one of these modules. The
        # second is loaded while the shell is being made.
        ends = [type(shell).__module__, "IPython.core.completerlib"]
        if not self.is_set_up:
            self.is_set_up = True
            loaded: dict[Any, object] = dict(sys.modules)
            if is_new_session:
                loaded = loaded_by_session("", ends)
            self.begin_baseline(executed_files(loaded))
            self.arrange_reports()
        elif is_new_session and self.baseline is not None:
            # After a fork it may be None: all that the parent had loaded. Otherwise
            # these two parts are added to it, but not what lies between: a person may
            # import libraries after "import IPython" and before the session begins.
            imported = loaded_by_session("IPython", ["IPython"])
            begun = loaded_by_session(("ipykernel", "IPython.terminal.ipapp"), ends)
            self.baseline |= executed_files({**imported, **begun})
        if is_new_session:
            self.mark = (0, None)  # the first cell is followed by a report in any case
            self.shell = shell
            shell.events.register("post_execute", self.report_after_cell)

    def arrange_reports(self) -> None:
        """Arrange for reports at the end of this process, and of its children."""
        register_unseen(self.report_at_exit)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.begin_in_child)
        self.report_when_workers_end()  # if this is one, of a forkserver for instance
        self.catch_sigterm()

    def update(self) -> None:
        """Find out which libraries were used since the last time."""
        baseline = self.baseline
        if baseline is None:
            baseline = executed_files(loaded_before_fork())
            self.baseline = baseline
        new = executed_files(dict(sys.modules)) - baseline - self.seen
        if not new:
            return
        used = set()
        for library, files in owners(new, baseline).items():
            if files.isdisjoint(baseline):
                used.add(library)
        if self.shell is not None:
            if not self.shell_libraries:
                self.shell_libraries = required_by_shell(baseline | new)
            used -= self.shell_libraries
        self.used |= used
        self.seen |= new

    def report(self) -> "list[str]":
        """Send what was not sent yet, and return those libraries.

        Raises nothing but what a signal handler raises, such as KeyboardInterrupt.
        """
        lock = self.lock  # a signal handler may fork meanwhile; the child has a new one
        if not lock.acquire(timeout=PATIENCE):
            debug("nothing sent: another report is being made")
            return []
        sent_before = set(self.sent)
        try:
            self.send_new()
        except (OSError, ValueError) as error:
            debug(f"nothing sent: {error}")
        except Exception as error:
            debug(f"nothing sent: {error!r}")
        finally:
            lock.release()
            if self.sigterm_came:
                self.sigterm_came = False
                # A signal, as this may be another thread than the main one, which only
                # a signal interrupts.
                kill(getpid(), _signal.SIGTERM)
        return sorted(self.sent - sent_before)

    def send_new(self) -> None:
        """Send the libraries that were not sent yet.

        Raises ValueError, with the reason, if nothing is to be sent, OSError if it
        cannot be sent.
        """
        mark = modules_mark()
        if self.baseline is None and mark == self.mark:
            # Nothing to send, and no page of memory was copied to find that out.
            raise ValueError("nothing was loaded since the fork")
        if opted_out():
            # What was loaded until now is not sent later either.
            self.begin_baseline(executed_files(dict(sys.modules)))
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
        self.mark = mark
        library_of = {}
        for library in sorted(self.used - self.sent):
            library_of[statsd_line(library, prefix, rate)] = library
        if not library_of:
            raise ValueError("no library was used, or none since the last report")
        if time.monotonic() < self.no_look_up_before:
            raise OSError("the last look-up of the host was slow, and failed")
        self.send_lines(library_of, host, port)

    def send_lines(
        self, library_of: "Mapping[bytes, str]", host: str, port: int
    ) -> None:
        """Send lines, and note which of their libraries were sent. Raises OSError."""
        packets = datagrams(library_of)
        begin = time.monotonic()
        try:
            send(packets, host, port)
        except OSError:
            now = time.monotonic()
            if now - begin > PATIENCE / 2:  # too long to happen after each cell
                self.no_look_up_before = now + PAUSE
            raise
        finally:
            # Only what send() did not send is left in the packets.
            unsent = set(b"\n".join(packets).split(b"\n"))
            for line, library in library_of.items():
                if line not in unsent:
                    self.sent.add(library)
                    debug(f"sent {line.decode()} to {host}:{port}")

    # Python, IPython and multiprocessing call the next three methods, from which no
    # exception may escape.

    def report_at_exit(self) -> None:
        try:
            self.no_look_up_before = LONG_AGO  # this is the last chance
            self.report()
        except BaseException:  # Ctrl-C, for instance: the process is ending already
            debug("stopped")

    def report_after_cell(self) -> None:
        """Report what a cell has loaded: a killed kernel runs nothing at exit."""
        try:
            if modules_mark() != self.mark or self.used - self.sent:
                self.report()
        except BaseException:  # IPython would show it, Ctrl-C too
            debug("stopped")

    def begin_in_child(self) -> None:
        """Begin anew after a fork: what the parent has loaded is the parent's."""
        try:
            sys.modules[FORK_MARK] = sys.modules.pop(FORK_MARK, atexit)
            self.begin_process()
            self.report_when_workers_end()
            if "multiprocessing.process" in sys.modules:  # multiprocess loads it, too
                self.uncatch_sigterm()
        except BaseException as error:  # Python would only print it, Ctrl-C too
            debug(f"not set up in a child: {error!r}")
        finally:
            self.release_sigterm()

    def report_when_workers_end(self) -> None:
        """Let the workers of multiprocessing report: they run no atexit functions.

        They run finalizers, but first drop those that exist after the fork, and then
        call what is registered here, which makes one. The low priority puts it behind
        those of the worker's libraries.
        """

        def make_finalizer(module: "Any") -> None:
            if not self.has_finalizer:
                self.has_finalizer = True
                module.Finalize(None, self.report_at_exit, exitpriority=-100)

        for name in ("multiprocessing.util", "multiprocess.util"):
            util: Any = sys.modules.get(name)
            # A module of that name may also be a person's own.
            if "register_after_fork" in namespace_of(util):
                util.register_after_fork(util, make_finalizer)

    # SIGTERM. Workers of multiprocessing keep the default action, and so does what may
    # be one. A pool ends them by SIGTERM, perhaps just before they begin to wait for a
    # task. A handler in Python would not run until that wait is over, so worker and
    # pool would hang.

    def catch_sigterm(self) -> None:
        """Let SIGTERM report, if that is switched on, and nobody handles it."""
        handler = _signal.getsignal(_signal.SIGTERM)
        is_unhandled = type(handler) is int and handler == _signal.SIG_DFL
        # multiprocessing starts a worker, or a forkserver, with "python -c" and code
        # that begins like this.
        starts = ("from multiprocessing.", "from multiprocess.")
        is_worker = any(word.startswith(starts) for word in sys.orig_argv)
        if is_on(SIGTERM_SWITCH) and is_unhandled and not is_worker:
            self.sigterm_handler = self.report_at_sigterm  # a new object at each access
            self.set_sigterm(self.sigterm_handler)
            if hasattr(os, "register_at_fork"):
                before, after = self.hold_sigterm, self.release_sigterm
                os.register_at_fork(before=before, after_in_parent=after)

    def uncatch_sigterm(self) -> None:
        """Let SIGTERM end the process at once again, unless it has another handler."""
        handler = _signal.getsignal(_signal.SIGTERM)  # None if C code has set it
        if handler is not None and handler is self.sigterm_handler:
            self.set_sigterm(_signal.SIG_DFL)

    def hold_sigterm(self) -> None:
        """Let SIGTERM wait while this thread forks.

        Python drops a SIGTERM that a child gets before it has begun to run.
        """
        blocked = _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGTERM])
        if _signal.SIGTERM not in blocked:
            self.forking.add(get_ident())

    def release_sigterm(self) -> None:
        thread = get_ident()
        if thread in self.forking:
            self.forking.remove(thread)
            _signal.pthread_sigmask(_signal.SIG_UNBLOCK, [_signal.SIGTERM])

    def report_at_sigterm(self, number: int, frame: object) -> None:
        """Report, and end by the signal all the same.

        If a handler of the program's own calls this one, it only reports, and that one
        decides how to end.
        """
        # Set this before looking at the lock: a report under way looks at it after
        # releasing the lock, and then sends the signal anew.
        self.sigterm_came = True
        if not self.lock.locked():
            self.sigterm_came = False
            self.report_at_exit()
            if _signal.getsignal(_signal.SIGTERM) is self.sigterm_handler:
                self.set_sigterm(_signal.SIG_DFL)
                kill(getpid(), _signal.SIGTERM)

    def set_sigterm(self, handler: "Any") -> None:
        try:
            _signal.signal(_signal.SIGTERM, handler)
        except ValueError as error:  # only the main thread may do that
            debug(f"cannot change what SIGTERM does: {error}")


def modules_mark() -> "tuple[int, object]":
    """Return the number of modules and the newest name, which tell of new modules."""
    try:
        return len(sys.modules), next(reversed(sys.modules), None)
    except RuntimeError:  # another thread has just loaded one
        return 0, None


def loaded_before_fork() -> "dict[Any, object]":
    """Return the modules that the parent had executed.

    Lazy ones are left out: they may have been executed since.
    """
    modules: dict[Any, object] = {}
    for name, module in dict(sys.modules).items():
        if name is FORK_MARK:
            break
        if not was_lazy(module):
            modules[name] = module
    return modules


def was_lazy(module: object) -> bool:
    """Tell whether a module was loaded by LazyLoader, which keeps notes in its spec.

    Whether it was executed, and when, is not known.
    """
    spec = namespace_of(module).get("__spec__")
    return type(spec) is ModuleSpec and type(spec.loader_state) is dict


def register_unseen(function: "Callable[[], None]") -> None:
    """Register a function to be called at exit, unseen by debuggers and coverage.

    A debugger would stop in it otherwise, and coverage warns if its trace function is
    not given back. So these are the steps:

        trace = sys.gettrace(); sys.settrace(None); function(); sys.settrace(trace)

    Written in Python, they would be traced themselves. So each is a call of a function
    in C: map() and filter() do nothing until extend() takes what they yield.
    """
    kept: list[Any] = []  # the trace function, if there is one
    ignored: list[object] = []
    # map() must pass something to the function that it calls. gettrace() takes nothing,
    # but call_tracing(gettrace, ()) merely calls it.
    found = map(sys.call_tracing, [sys.gettrace], [()])
    # This yields None if there is one. append() is a function in C that returns None.
    none_for_each: Any = map([].append, kept)
    steps: list[tuple[Any, ...]] = [
        (kept.extend, filter(None, found)),  # keep the trace function,
        (ignored.extend, map(sys.settrace, none_for_each)),  # take it away,
        (function,),
        (ignored.extend, map(sys.settrace, kept)),  # and give it back
    ]
    monitoring = getattr(sys, "monitoring", None)
    if monitoring is not None:
        debuggers = filter(monitoring.get_tool, [monitoring.DEBUGGER_ID])
        mute = (ignored.extend, map(monitoring.set_events, debuggers, [0]))
        steps.insert(0, mute)  # for good: debuggers that use it get no more events
    for step in reversed(steps):  # for atexit takes the last one first
        atexit.register(*step)


def ipython_shell() -> "Any":
    """Return the IPython shell that this process runs, or None. Imports nothing."""
    module = sys.modules.get("IPython.core.interactiveshell")
    shell_class = namespace_of(module).get("InteractiveShell")
    if shell_class is None or not shell_class.initialized():
        return None
    shell = shell_class.instance()
    application: Any = getattr(shell, "parent", None)
    kind: Any = type(application)
    is_terminal = kind.__module__ == "IPython.terminal.ipapp"
    # ipdb makes an application only to get a shell from it. That of "ipython -c" does
    # not interact either, but IPython has initialized it as the process's own.
    if is_terminal and not kind.initialized() and not application.interact:
        return None
    return shell


def loaded_by_session(
    prefix: "str | tuple[str, ...]", ends: "list[str]"
) -> "dict[str, object]":
    """Return a part of sys.modules, which is in the order in which imports ended.

    So a module stands behind those that it imports. Matplotlib is left out, with what
    it has loaded, if IPython has loaded it because its settings name it.

    prefix: the part begins with the first name that starts like this; "" means the
        first of all
    ends: it stops after the last one of these names
    """
    loaded = dict(sys.modules)
    names = [name for name in loaded if type(name) is str]
    while names and names[-1] not in ends:
        del names[-1]
    left_out = loaded_with_matplotlib(names)
    modules: dict[str, object] = {}
    is_part = False
    for name in names:
        is_part = is_part or name.startswith(prefix)
        if is_part and name not in left_out:
            modules[name] = loaded[name]
    return modules


def loaded_with_matplotlib(names: "list[str]") -> "set[str]":
    """Return those names that belong to matplotlib, or to what it has loaded.

    names: in the order of sys.modules

    Nothing is returned if it was loaded before IPython, or could not be loaded.
    """
    is_session = False
    parts = []  # of matplotlib
    for name in names:
        is_session = is_session or name.startswith(("IPython", "ipykernel"))
        if is_session and name.startswith("matplotlib."):
            parts.append(name)
    if not parts:
        return set()
    # The package itself comes after its first parts, and after what these load.
    begin = names.index(parts[0])
    if "matplotlib" not in names[begin:]:
        return set()
    end = names.index("matplotlib") + 1
    return set(names[begin:end]).union(parts)


def required_by_shell(files: "Iterable[str]") -> "set[str]":
    """Return IPython, ipykernel and all that they require.

    In a session, a person's import of one of these cannot be told from the shell's own.

    files: imported ones, which tell the folders to search
    """
    installed: dict[str, list[Distribution]] = {}
    for entry in path_entries(files):
        for distribution in entry.unread:  # these are all, as none was read
            installed.setdefault(distribution.short_name, []).append(distribution)
    required: set[str] = set()
    queue = ["ipython", "ipykernel"]
    while queue:
        library = queue.pop()
        if library not in required:
            required.add(library)
            for distribution in installed.get(squeezed(library), ()):
                queue += distribution.requirements()
    return required


# One process, one reporter: Spyder and Streamlit import the module again, others reload
# it, but sys stays. What the first copy has registered, to be called at exit and so on,
# stays, but calls the last copy's methods. So attributes and methods must keep their
# names and meanings from one version to the next, and a new attribute may be missing if
# an older version has made the object.
_reporter: Reporter = vars(sys).setdefault("_popcon_reporter", Reporter())
_reporter.__class__ = Reporter


def setup_reporter() -> None:
    """Report what is used from now on: at exit, and in IPython after each cell.

    Libraries that are loaded already do not count, except for those that an IPython
    session has loaded after its shell was made. A later call loses nothing. If a
    session has begun since, that call leaves out what the session needed for itself.
    Raises nothing, and prints nothing unless PYTHON_POPCONTEST_DEBUG is on.
    """
    try:
        _reporter.set_up()
    except Exception as error:
        debug(f"not set up completely: {error!r}")


def used_libraries() -> "set[str]":
    """Return the libraries used, sent or not, since setup_reporter() or the last fork.

    Without a set-up these are all that are loaded. A report that DO_NOT_TRACK has
    forbidden begins anew.
    """
    _reporter.update()
    return set(_reporter.used)


def report() -> "list[str]":
    """Send now what was not sent yet, and return the names that were sent.

    It is for a server that never exits, for instance. Raises nothing but what a signal
    handler raises. The setting PYTHON_POPCONTEST_DEBUG tells why nothing was sent, and
    the next call tries again.
    """
    return _reporter.report()


# ---- the command line ---------------------------------------------------------------

if TYPE_CHECKING:
    import socket

    Command = Callable[[argparse.Namespace], int]
    Findings = Iterator[tuple[str, str, str]]  # "ok" or another state, of what, why
    Check = Callable[[argparse.Namespace], Findings]
    # Of a series in Prometheus:
    Labels = frozenset[tuple[str, str]]  # names and values, also ("__name__", NAME)
    Samples = list[tuple[float, float]]  # times in seconds since 1970, and values


def note(text: str) -> None:
    """Print a sentence on stderr. It is no error if that is full or closed."""
    if sys.stderr is not None:
        try:
            print(f"popcon: {readable(text, 320)}", file=sys.stderr, flush=True)
        except (OSError, ValueError):
            pass


def readable(text: str, width: int) -> str:
    """Return a text in one short line, without control characters."""
    text = text[:9999]
    for character in set(text):
        if not character.isprintable():
            text = text.replace(character, " ")
    return " ".join(text.split())[:width]


def counted_noun(number: int, one: str, many: str) -> str:
    """Return a number with its noun, such as "1 library" or "2 libraries"."""
    noun = one if number == 1 else many
    return f"{number:,} {noun}"


# ---- selftest -----------------------------------------------------------------------

SELFTEST = "popcon-selftest"  # a library that does not exist; usage does not show it


def selftest(options: "argparse.Namespace") -> int:
    """Show whether reporting works here, and which settings are in force.

    With --prometheus or --metrics, also send one count, and wait until it arrives
    there: for three scrapes, or three minutes.
    """
    status = 0
    checks = (check_files, check_processes, check_settings, check_server, check_chain)
    for check in checks:
        for state, what, text in findings(check, options):
            print(f"{state:9}{what:11}{text}", flush=True)
            if state == "error":
                status = 1
    return status


def findings(check: "Check", options: "argparse.Namespace") -> "Findings":
    """Yield what a check finds. If the check itself fails, that is an error, too."""
    try:
        yield from check(options)
    except Exception as error:
        yield "error", check.__name__.removeprefix("check_"), str(error)


def check_files(_: "argparse.Namespace") -> "Findings":
    """Tell whether popcon.py lies where Python imports it from.

    If its bytecode is not there, write it, as an import would do.
    """
    from compileall import compile_file

    yield "ok", "popcon", f"{__version__}, {__file__}"
    yield "ok", "Python", f"{sys.version.split()[0]}, {sys.prefix}"
    library = Places().library
    if not os.path.exists(library):
        yield "warning", "import", f"{library} is not there; `install` puts it there"
    elif not is_popcon(library):
        yield "error", "import", f"{library} is not popcon's, and hides it"
    elif compile_file(library, quiet=2):
        yield "ok", "bytecode", f"is there for {library}"
    else:  # compile_file() cannot write it
        yield "warning", "bytecode", f"no: each start compiles {library} anew"


def check_processes(_: "argparse.Namespace") -> "Findings":
    """Start processes that import a library, and tell which of them report it."""
    set_up = "import runpy, sys; runpy.run_path(sys.argv[1])['setup_reporter'](); "
    use = "import popcon_selftest"
    sent, said = trial("-c", set_up + use, __file__)
    text = f"a process that used a library sent {sent!r} to this test"
    if sent == b"python_popcon.library_used.popcon-selftest:1|c":
        yield "ok", "reporting", text
    else:
        yield "error", "reporting", f"{text}; it said:\n{said}".rstrip()
    has_ipython = PathFinder.find_spec("IPython") is not None
    if trial("-c", use)[0]:
        yield "ok", "processes", "each Python process reports"
    elif has_ipython:
        yield "ok", "processes", "no script reports without `install --all-processes`"
    else:
        text = "nothing reports without `install --all-processes`: here is no IPython"
        yield "warning", "processes", text
    if not has_ipython:
        return
    if trial("-m", "IPython", "--quick", "-c", use)[0]:
        yield "ok", "IPython", "each session of IPython and Jupyter reports"
    else:
        yield "warning", "IPython", "no session reports; `install` changes that"


def trial(*arguments: str) -> "tuple[bytes, str]":
    """Run Python in a folder with a library that is called as SELFTEST says.

    Return what it sends, and what it writes to stderr.
    """
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
        settings = {
            HOST: "127.0.0.1",
            PORT: str(server.getsockname()[1]),
            PREFIX: "",
            SAMPLE_RATE: "",
            DEBUG_SWITCH: "1",
            "DO_NOT_TRACK": "0",
            "IPYTHONDIR": folder,
            "PYTHONSAFEPATH": "",
        }
        ended = run(
            [sys.executable, "-B", *arguments],
            env=os.environ | settings,
            cwd=folder,
            stdin=DEVNULL,
            capture_output=True,
            timeout=60,
        )
        server.sendto(b"", server.getsockname())  # so that recv() returns
        return server.recv(65536), ended.stderr.decode(errors="replace")


def check_settings(_: "argparse.Namespace") -> "Findings":
    """Tell which settings are in force. Warn of variables whose names are misspelt."""
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
            text = "collect, and README's rules, count only python_popcon.library_used "
            text += "and python_popcon.namespace.NAME.library_used, with no dot in NAME"
            yield "warning", "mapping", text
    for switch in (SIGTERM_SWITCH, DEBUG_SWITCH):
        if is_on(switch):
            yield "ok", "switch", f"{switch} is on"
    known = [*SETTINGS, SIGTERM_SWITCH, DEBUG_SWITCH]
    for name in sorted(os.environ):
        if "POPCON" in name.upper() and name not in known:
            text = f"{name} is no setting: they are {', '.join(known)}"
            yield "warning", "unknown", text
    if opted_out():
        yield "warning", "opted out", "DO_NOT_TRACK is set: nothing is sent"


def check_server(options: "argparse.Namespace") -> "Findings":
    """Send an empty datagram, which counts nothing.

    It is left out if check_chain() is going to send a real count.
    """
    is_chain_checked = options.prometheus or options.metrics
    if os.environ.get(HOST) and not is_chain_checked and not opted_out():
        text = f"{send_and_listen(b'')}, does not refuse datagrams; "
        text += "whether it counts them, --prometheus or --metrics shows"
        yield "ok", "server", text


def send_and_listen(data: bytes) -> str:
    """Send a datagram to the server in the settings, and return its host and port.

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
            udp.connect(address)  # so that recv() raises an error if nobody listens
            udp.send(data)
            udp.recv(1)
    except TimeoutError:
        pass  # a statsd server does not answer
    except ConnectionRefusedError:
        raise OSError(f"nobody listens at {place}") from None
    except OSError as error:
        raise OSError(f"nothing can be sent to {place}: {error}") from None
    return place


def check_chain(options: "argparse.Namespace") -> "Findings":
    """Send one count, and wait until Prometheus, an exporter or collect has it."""
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
        after = selftest_counters(options)
        risen = []
        for name, samples in after.items():
            if name not in before or newest(samples) != newest(before[name]):
                risen.append(name)
        if risen or time.monotonic() > end:
            break
        time.sleep(1)
    arrive = f"do datagrams arrive at {place}?"
    if any(map(is_mapped, risen)):
        yield "ok", "chain", f"one count arrived at {server}"
    elif risen:
        text = f"one count arrived as {unmapped_name()}"
        yield "error", "chain", f"{text}: the mapping does not know the prefix"
    elif any(map(is_mapped, after)):
        text = f"{server} knows the counter, but it did not rise"
        yield "error", "chain", f"{text}: {arrive}"
    else:
        text = f"{server} knows no such counter: {arrive}"
        if options.prometheus:
            text += " Is the exporter scraped?"
        yield "error", "chain", text


def newest(samples: "Samples") -> float:
    """Return the value of the newest sample."""
    _, value = samples[-1]
    return value


def selftest_counters(options: "argparse.Namespace") -> "dict[str, Samples]":
    """Return the samples of each counter that counts SELFTEST. Raises OSError."""
    now = time.time()
    counters: dict[str, Samples] = {}
    if options.metrics:
        for name, labels, value in metrics_in(metrics_text(options)):
            if name == unmapped_name() or labels.get("library") == SELFTEST:
                counters[f"{name} {labels}"] = [(now, value)]
        return counters
    for matcher in (f'__name__="{unmapped_name()}"', f'library="{SELFTEST}"'):
        query = "{" + matcher + "}[3h]"
        form = {"query": query, "time": now}
        for series, samples in series_of(options, "query", form).items():
            if samples:
                counters[str(sorted(series))] = samples
    return counters


def is_mapped(counter: str) -> bool:
    """Tell whether a counter has the label library="popcon-selftest" from the mapping.

    Otherwise it has the unmapped_name(), in which there are no hyphens.
    """
    return SELFTEST in counter


def unmapped_name() -> str:
    """Return the name that statsd_exporter gives a counter that no rule matches."""
    return f"{setting(PREFIX)}.{SELFTEST}".replace(".", "_").replace("-", "_")


def patience_with(counters: "dict[str, Samples]") -> float:
    """Return how many seconds to wait: three scrape intervals, or three minutes."""
    for counter, samples in counters.items():
        times = [when for when, _ in samples]
        gaps = [later - when for when, later in zip(times, times[1:])]
        if gaps and is_mapped(counter):
            return max(30, 3 * min(gaps))
    return 180


# ---- run ----------------------------------------------------------------------------


def add_run_options(parser: "argparse.ArgumentParser") -> None:
    from argparse import REMAINDER, SUPPRESS

    program = "(SCRIPT | -m MODULE | -c CODE) [ARGUMENTS ...]"
    parser.usage = f"python -m popcon run [--explain] {program}"
    text = "Print whose each module is, or why it does not count."
    parser.add_argument("--explain", action="store_true", help=text)
    for name in ("-m", "-c", "script"):
        # Each takes all the arguments that follow; from "--" on, script does.
        parser.add_argument(name, nargs=REMAINDER, default=[], help=SUPPRESS)


def run(options: "argparse.Namespace") -> "NoReturn":
    """Run a program, and print at its end what it would send. Nothing is sent."""
    import runpy
    from types import ModuleType

    program = [*options.m, *options.c, *options.script]
    if not program:
        command_line().error("a program is missing: SCRIPT, -m MODULE or -c CODE")
    what = program[0]
    folder = os.getcwd()
    main_module = ModuleType("__main__")
    if not options.m and not options.c:
        main_module.__file__ = os.path.join(folder, what)
        folder = os.path.dirname(os.path.realpath(what))
        with open(what, "rb") as file:
            code = compiled(file.read(), main_module.__file__)
    elif options.c:
        program[0] = "-c"
        folder = ""
        code = compiled(what, "<string>")
    sys.argv = program
    del sys.path[: len(STANDARD_FOLDERS)]  # main() has inserted them
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
        trace = trace.tb_next  # leave out the frame of this function
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        sys.exit(1)
    sys.exit()


def compiled(source: "str | bytes", file: str) -> "Any":
    """Compile a program. Raises OSError if it is not written in Python."""
    if file.endswith(".ipynb"):
        raise OSError(f"{file}: run what `jupyter nbconvert --to script` makes of it")
    try:
        return compile(source, file, "exec")
    except (SyntaxError, ValueError) as error:
        raise OSError(f"{file} is no Python program: {error}") from None


class Rehearsal(Reporter):
    """A reporter that prints on stderr what it would send."""

    def send_lines(
        self, library_of: "Mapping[bytes, str]", host: str, port: int
    ) -> None:
        for line in library_of:
            print(line.decode(), file=sys.stderr)


def conclude_at_exit(explain: bool) -> None:
    """Let this process print at its end what it would have sent."""
    opt_out = os.environ.get("DO_NOT_TRACK", "0")
    os.environ["DO_NOT_TRACK"] = "1"  # so that the usual reporter sends nothing
    process = os.getpid()
    known = set(sys.modules)
    reporter = Rehearsal()
    reporter.baseline = executed_files(dict(sys.modules)) | {__file__}
    reporter.draw = 0.0  # whatever the sample rate, it is in the sample

    def conclude() -> None:
        if sys.stderr is None or os.getpid() != process:
            return
        os.environ["DO_NOT_TRACK"] = opt_out
        # send_new() wants a host, but Rehearsal sends nothing to it.
        os.environ[HOST] = os.environ.get(HOST) or "localhost"
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

    # It runs last, as the program registers its own functions later.
    atexit.register(conclude)


def explanation(new: "Mapping[str, object]", used: "set[str]") -> "Iterator[str]":
    """Yield lines that say whose new modules are, and why some do not count."""
    files = executed_files(new)
    owned = owners(files, files)
    for library in sorted(owned):
        if library in used:
            yield f"{library}: {counted_noun(len(owned[library]), 'module', 'modules')}"
        else:
            yield f"not counted: {library}: it was loaded before"
    for file in sorted(files.difference(*owned.values())):
        yield f"not counted: {file}: of no library, or of an editable install"
    for name in sorted(new):
        is_library = name.partition(".")[0] not in IGNORED_NAMES
        if is_library and not executed_files({name: new[name]}):
            yield f"not counted: {name}: not executed, without a file, or Python's own"


# ---- install, uninstall -------------------------------------------------------------

# A file with one of these near its beginning is popcon's, of whatever version.
MARK = "# popcon counts which installed libraries are used, and nothing about who uses "
MARK += "them.\n"
MARKS = (MARK, '"""popcon: which installed libraries do people really use')

# What IPython runs at the start of each session. It loads only the popcon.py in
# site-packages. A person's own beside a notebook is left alone, and can be imported
# afterwards. It is silent if popcon.py is missing or incomplete, or if an older Python
# runs it. It leaves no name behind.
SESSION = f"""\
{MARK}def _popcon():
    import importlib.util, site
    from importlib.machinery import PathFinder
    spec = PathFinder.find_spec("popcon", site.getsitepackages())
    popcon = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(popcon)
    popcon.setup_reporter()
try:
    _popcon()
except Exception:
    pass
del _popcon
"""

# What Python runs at the start of each process, in a virtual environment twice. It
# loads only the popcon.py beside it: sitedir is the folder of the .pth file. A person's
# own popcon.py is left alone, and can be imported afterwards. Only a line that begins
# with import is run, and only exec() lets one line be silent if popcon.py cannot be
# read. From Python 3.18 on .start files (PEP 829) are read instead; they allow neither.
PROCESS = """\
try:
    if not hasattr(sys, "_popcon_reporter"):
        from _frozen_importlib import module_from_spec
        from _frozen_importlib_external import PathFinder
        spec = PathFinder.find_spec("popcon", [sitedir])
        popcon = module_from_spec(spec)
        spec.loader.exec_module(popcon)
        popcon.setup_reporter()
except Exception:
    pass
"""
PTH = f"import sys; exec({PROCESS!r})\n"


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
            # If somebody has a package popcon there, it would hide our file.
            self.library = spec.origin
        folder = os.path.join(sys.prefix, "etc", "ipython", "startup")
        self.session = os.path.join(folder, "000-popcon.py")
        self.process = os.path.join(site_packages, "popcon.pth")
        self.process_text = MARK + PTH
        if sys.version_info >= (3, 18):
            self.process = os.path.join(site_packages, "popcon.start")
            self.process_text = MARK + "popcon:setup_reporter\n"


def foreign(path: str) -> str:
    """Return why a file is not one that install wrote, "" if it is, in any version."""
    if not is_popcon(path):
        return "it is not popcon's"
    if owners({path}, {path}):
        return "it was installed by pip, so `pip uninstall popcon` removes it"
    return ""


def is_popcon(path: str) -> bool:
    """Tell whether a file is one of popcon's, of whatever version."""
    start = text_of(path)[:200]
    return any(mark in start for mark in MARKS)


def write_whole(path: str, pieces: "Iterable[bytes]") -> None:
    """Write a file so that readers see it whole, or not at all. Raises OSError."""
    unfinished = f"{path}.{os.getpid()}.unfinished"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.lexists(unfinished):
            os.remove(unfinished)  # a killed process left it, or it is somebody's link
        with open(unfinished, "xb") as file:  # "x" follows no link
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
    os.umask(0o022)  # so that everybody who uses the environment can read the files
    said = []  # printed when all is done, as printing may fail
    for path, content in files.items():
        if read(path) == content:
            said.append(f"found {path}")
        else:
            write_whole(path, [content])
            said.append(f"wrote {path}")
    # For -O and -OO, too: then no process of anybody has to compile or write it.
    results = []
    for level in (0, 1, 2):
        results.append(compile_file(places.library, quiet=2, optimize=level))
    if all(results):
        said.append(f"compiled {places.library}")
    print("\n".join(said))
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
    said = []  # printed when all is done, as printing may fail
    for path in (places.session, places.process, places.library):
        ours += glob(f"{escape(path)}.*.unfinished")  # a killed install leaves them
        if os.path.lexists(path):
            reason = foreign(path)
            if reason:
                said.append(f"left {path}: {reason}")
            else:
                ours.append(path)
    if places.library in ours:
        folder = escape(os.path.dirname(places.library))
        ours += glob(os.path.join(folder, "__pycache__", "popcon.*.pyc*"))
    failure = ""
    for path in ours:
        try:
            os.remove(path)
        except PermissionError:
            failure = f"you may not remove {path}"
            break
        except OSError as error:
            failure = f"{path} cannot be removed: {error.strerror}"
            break
        said.append(f"removed {path}")
    if not ours:
        said.append(f"nothing to remove in {sys.prefix}")
    for line in said:
        print(line)
    if failure:
        raise OSError(failure)
    return 0


# ---- collect ------------------------------------------------------------------------
#
# This does what statsd_exporter and Prometheus do, as far as one machine needs it: it
# adds up the datagrams, and keeps the counts in a file that `usage --metrics` reads.

BUFFER = 4 << 20  # bytes; enough for a thousand processes that end at once
LONGEST_NAME = 200  # characters of a library and its namespace
LONGEST_LINE = 1000  # bytes in the file; no line that collect has written is as long
MOST_NAMES = 80_000  # so many of the longest names take 48 MB of memory
SAVE_AFTER = 9  # seconds between writes, if counts have changed
ALIVE_AFTER = 60  # seconds between writes, if no count has changed

# Names of samples in the file. An exporter has the first one, too.
START = "process_start_time_seconds"  # since when all datagrams were counted
ALIVE = "popcon_collect_last_alive_time_seconds"  # when the file was written

# A line of a datagram that README's mapping counts, as statsd_exporter reads it.
COUNT_LINE = (
    rb"(?m)^python_popcon\.(?:namespace\.([A-Za-z0-9_-]+)\.)?library_used"
    rb"\.([a-z0-9]+(?:-[a-z0-9]+)*):([0-9]{1,9})\|c(?:\|@([0-9]{0,9}\.?[0-9]{1,18}))?$"
)
# A line of the file, as CountFile.lines() writes it.
FILE_LINE = (
    rb'(?:python_popcon_library_used\{library="([a-z0-9-]+)"'
    rb'(?:,namespace="([A-Za-z0-9_-]+)")?\}|([a-z_]+))'
    rb" ([0-9]+(?:\.[0-9]+)?(?:e[+-][0-9]{2})?)\n"
)


def add_collect_options(parser: "argparse.ArgumentParser") -> None:
    text = "Keep the counts in this file, which `usage --metrics FILE` reads."
    parser.add_argument("file", metavar="FILE", help=text)
    parser.add_argument(
        "--listen",
        type=address,
        default=("127.0.0.1", 9125),
        metavar="ADDRESS:PORT",
        help="Receive datagrams there, by default at 127.0.0.1:9125, which only this "
        "machine reaches. With 0.0.0.0:9125 other machines reach it, too.",
    )


def address(text: str) -> "tuple[str, int]":
    """Return the host and the port of ADDRESS:PORT."""
    from argparse import ArgumentTypeError

    host, colon, port = text.rpartition(":")
    is_ambiguous = ":" in host and not host.startswith("[")
    if not colon or not is_port(port) or is_ambiguous:
        raise ArgumentTypeError("it must be as 0.0.0.0:9125, or as [::]:9125 for IPv6")
    return host.strip("[]") or "0.0.0.0", int(port)


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
            udp.settimeout(0)  # what has arrived is still received

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
    """Lock a file against other collects until this process ends. Raises OSError.

    The lock is on a second file, as each save() replaces the first one. That file is
    not closed, as closing it would end the lock.
    """
    if os.path.isdir(path):
        raise OSError(f"{path} is a folder, where a file is to be named")
    try:
        lock_file = os.open(f"{path}.lock", os.O_WRONLY | os.O_CREAT, 0o644)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from None
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock

        flock(lock_file, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        raise OSError(f"another collect counts into {path}") from None
    except (ImportError, OSError):
        pass  # Windows has no such locks, nor do some network file systems


def listening(host: str, port: int) -> "socket.socket":
    """Return a socket that receives datagrams. Raises OSError."""
    import socket

    place = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        family, kind, _, _, where = found[0]
        udp = socket.socket(family, kind)
        udp.bind(where)
    except UnicodeError:  # a part of the name is empty, or longer than 63 letters
        raise OSError(f"cannot listen at {place}: this is no name of a host") from None
    except OSError as error:
        message = f"cannot listen at {place}: {error.strerror}"
        raise OSError(f"{message}; --listen takes another address or port") from None
    option = (socket.SOL_SOCKET, socket.SO_RCVBUF)
    try:
        udp.setsockopt(*option, BUFFER)
    except OSError:
        pass  # macOS and BSD refuse a size that Linux would reduce
    if udp.getsockopt(*option) < BUFFER:
        note(f"bursts may get lost; as root: sysctl -w net.core.rmem_max={BUFFER}")
    return udp


class CountFile:
    """The counts, and the file that keeps them, in the format of Prometheus.

    numbers: how many processes used each library; the keys are those of key_of()
    since: since when all datagrams were counted, but for short gaps
    alive: when this process last tried to write the file, or else an earlier one did
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.numbers: dict[bytes, float] = {}
        self.since = time.time()
        self.alive = self.since
        self.is_changed = False  # since the file was written
        self.tried = 0.0  # when save() was last called, on time.monotonic()
        self.failure = ""  # why the file could not be written then
        self.is_full = False

    def load(self) -> None:
        """Read the file, if there is one. Raises OSError if it is not collect's."""
        import re

        if not os.path.exists(self.path):
            return
        failure = OSError(f"{self.path} was not written by collect, or is damaged")
        times = {}
        with open(self.path, "rb") as file:
            while True:
                line = file.readline(LONGEST_LINE)
                if not line:
                    break
                found = re.fullmatch(FILE_LINE, line)
                if found is None:
                    raise failure
                library, namespace, name, number = found.groups()
                if name:
                    times[name.decode()] = float(number)
                else:
                    self.numbers[key_of(library, namespace)] = float(number)
        if times.keys() != {START, ALIVE}:
            raise failure
        self.since = times[START]
        self.alive = times[ALIVE]

    def add(self, datagram: bytes) -> None:
        """Add what a datagram counts. Lines that popcon does not send are left out."""
        import re

        for namespace, library, number, rate in re.findall(COUNT_LINE, datagram):
            if len(namespace) + len(library) > LONGEST_NAME:
                continue
            key = key_of(library, namespace)
            self.is_changed = True  # either a number, or self.since
            if key not in self.numbers and len(self.numbers) >= MOST_NAMES:
                self.since = time.time()  # until now, not everything was counted
                if not self.is_full:
                    note(f"{MOST_NAMES:,} names are enough: new ones are left out")
                self.is_full = True
                continue
            share = float(rate or 1)
            if share == 0:
                share = 1  # as statsd_exporter takes it
            self.numbers[key] = self.numbers.get(key, 0) + int(number) / share

    def is_due(self) -> bool:
        """Tell whether it is time to write the file."""
        wait = SAVE_AFTER if self.is_changed else ALIVE_AFTER
        return time.monotonic() > self.tried + wait

    def save(self) -> None:
        """Write the file. If that fails, print why; the next call tries it again."""
        now = time.time()
        # self.alive is still the time of the last call, or what load() has read. If
        # nobody listened since then, or the clock was set, uses may have been missed.
        is_long_gap = now - self.alive > harmless_gap(self.alive - self.since)
        if is_long_gap or self.since > now:
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
        """Yield the lines of the file."""
        yield f"{START} {self.since:.3f}\n".encode()
        yield f"{ALIVE} {self.alive:.3f}\n".encode()
        for key in sorted(self.numbers):
            library, _, namespace = key.decode().partition(".")
            labels = f'library="{library}"'
            if namespace:
                labels += f',namespace="{namespace}"'
            line = f"python_popcon_library_used{{{labels}}} {self.numbers[key]:.15g}\n"
            yield line.encode()


def key_of(library: bytes, namespace: "bytes | None") -> bytes:
    """Return a short name for a counter, as there may be many of them in memory."""
    if namespace:
        return library + b"." + namespace
    return library


def harmless_gap(seconds: float) -> float:
    """Return how long an outage in a time may be: two hours, or 1 % of the time."""
    return max(7200, seconds / 100)


# ---- usage: what is used, and what can go -------------------------------------------
#
# First the counts, from Prometheus or from an exporter's own metrics; then the
# libraries that are installed; who requires what; the verdict on each; the table.

CAN_GO = {"unused", "rare"}
# The workers of these do not report: they are killed, or end by os._exit().
WORKERS = {"celery", "parsl", "pyspark", "ray", "rq"}


def usage(options: "argparse.Namespace") -> int:
    """Print how much the libraries are used, and which can go.

    The exit status is 0 for an answer, 1 for none yet, 2 for misuse or a failure.
    """
    import json

    try:
        counts = counted(options)
        libraries = judged(counts, options)
        say_limits(libraries, counts)
    except ValueError as error:  # a setting is wrong, or a header
        raise OSError(str(error)) from None
    if counts.doubt and (options.json or options.unused):
        note(counts.doubt)  # which the table ends with
    if options.json:
        lines = [json.dumps([library.as_json() for library in libraries], indent=1)]
    elif options.unused:
        lines = [library.name for library in libraries if library.section in CAN_GO]
    else:
        lines = table(libraries, counts, options)
    for line in lines:
        print(line)
    if counts.doubt:
        return 1
    return 0


def say_limits(libraries: "list[Library]", counts: "Counts") -> None:
    """Print on stderr what one should know before one relies on the answer."""
    rate = setting(SAMPLE_RATE)
    if float(rate) < 1:
        note(f"a sample of {rate} of the processes reports: rare uses may be missed")
    sections = [library.section for library in libraries]
    if not everyone_reports() and not CAN_GO.isdisjoint(sections):
        note(
            "only IPython and Jupyter report here by themselves: scripts are not "
            "known, nor kernels of virtual environments upon this one"
        )
    workers = ", ".join(sorted(WORKERS.intersection(counts.processes)))
    if workers:
        note(
            f"what workers of {workers} import is known only if they call "
            "popcon.report()"
        )
    absent = sections.count("absent")
    used_here = len(counts.processes) - absent
    if absent > 5 and absent > 2 * used_here:
        note(
            f"{absent} libraries were counted that are not installed in {sys.prefix}, "
            f"which has {len(libraries) - absent}: is it the right environment?"
        )


def everyone_reports() -> bool:
    """Tell whether every process reports, and not only sessions of IPython and Jupyter.

    The popcon.pth of `install --all-processes` runs at the start of every process. So
    it has set popcon up here as well, although this is no session.
    """
    return _reporter.is_set_up and ipython_shell() is None


# -- the counts

DAY = 86400  # seconds
# Units of time, in seconds. The largest comes first, as Window.in_its_unit() needs it.
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
IS_EXPORTER = "give Prometheus by its base URL, or an exporter as --metrics URL"
# Seconds before the window in which a last scrape is looked for. Some scrape only
# hourly, for privacy.
LOOK_BACK = 7200
ANSWER_LIMIT = 256 << 20  # bytes of a web server's answer


class Window:
    """A span of time that ends now, as PromQL writes it, such as 90d."""

    def __init__(self, text: str) -> None:
        words = "a whole number above 0 with a unit, such as 90d or 12h"
        must_match("[1-9][0-9]{0,8}(ms|[smhdwy])", text, words)
        number = text.rstrip("mshdwy")
        self.text = text
        self.unit = UNITS[text.removeprefix(number)]  # seconds
        self.seconds = int(number) * self.unit
        # If nobody counted for so many seconds, that does no harm.
        self.outage: float = min(harmless_gap(self.seconds), self.seconds / 10)

    def in_its_unit(self, seconds: float) -> str:
        """Return another span, rounded down, in the same unit or a smaller one."""
        for unit, length in UNITS.items():
            if length <= self.unit and seconds >= length:
                return f"{int(seconds / length)}{unit}"
        return "0s"


class Counts:
    """How many processes used each library in the window.

    processes: their number, only of libraries that were used
    since: when counting began, in seconds since 1970
    doubt: why these counts are no answer, "" if they are one
    """

    def __init__(self) -> None:
        self.processes: dict[str, float] = {}
        self.since = 0.0
        self.doubt = ""

    def add(self, library: str, number: float) -> None:
        """Add to the number of processes that used a library."""
        name = normalized(library)
        if name and name != SELFTEST and number > 0:
            number = min(number, 1e12)  # 1e999 would be infinite
            self.processes[name] = self.processes.get(name, 0) + number


def counted(options: "argparse.Namespace") -> Counts:
    """Return the counts that the options ask for. Raises OSError or ValueError."""
    now = time.time()
    window = options.window
    if options.prometheus:
        counts = Prometheus(options, now).counts()
    else:
        counts = exporter_counts(options, now)
    known = now - counts.since
    # It is good enough if a hundredth of the window is missing, 21 hours of 90 days.
    is_too_early = known < 0.99 * window.seconds
    # A collect or an exporter that has just begun may have no counts yet.
    if not counts.processes and not (options.metrics and is_too_early):
        raise OSError(
            f"no count of {metric_name()} rose in {window.text}: do {PREFIX} and "
            "--match fit, does anything report (see selftest), did a ttl end counters?"
        )
    if is_too_early and not counts.doubt:
        shown = window.in_its_unit(known)
        counts.doubt = f"No answer yet: the counts reach back {shown} of {window.text}"
        if not counts.processes:
            counts.doubt += f"; nothing was counted as {metric_name()} so far"
        elif shown != "0s":
            counts.doubt += f"; try --window {shown}"
    return counts


def metric_name() -> str:
    """Return the name that README's mapping gives the counters. Raises ValueError."""
    import re

    prefix = re.sub(r"(^|\.)namespace\.[^.]+\.", ".", setting(PREFIX), count=1)
    return re.sub("[.-]", "_", prefix.strip("."))


def exporter_counts(options: "argparse.Namespace", now: float) -> Counts:
    """Return the counts of statsd_exporter or collect, from a URL or a file."""
    if options.match:
        raise OSError("--match is for --prometheus; --metrics are taken as they are")
    text = metrics_text(options)
    metric = metric_name()
    counts = Counts()
    starts = []
    alive = now
    for name, labels, value in metrics_in(text):
        if name == START:
            starts.append(value)
        elif name == ALIVE:
            alive = min(alive, value)
        elif name == metric:
            counts.add(labels.get("library", ""), value)
    # If the file holds the metrics of several exporters, take the latest start.
    counts.since = min(now, max(0.0, *starts))
    # A collect that has nothing to count writes its file only once in ALIVE_AFTER.
    if now - alive > max(options.window.outage, 2 * ALIVE_AFTER):
        counts.doubt = "No answer: collect has stopped, later uses are not counted"
    if os.path.isfile(options.metrics):
        days = int((now - os.path.getmtime(options.metrics)) / DAY)
        if days > 0:
            note(f"the file is {days}d old: later uses are not in it")
    return counts


def metrics_text(options: "argparse.Namespace") -> str:
    """Return the text at the URL or in the file of --metrics. Raises OSError."""
    source = options.metrics
    if source.startswith(("http://", "https://")):
        text = fetch(source, {}, options)
    else:
        with open(source, encoding="utf-8", errors="replace", newline="\n") as file:
            text = file.read(ANSWER_LIMIT)
    names = {name for name, _, _ in metrics_in(text)}
    if START not in names or not text.endswith("\n"):  # the format ends with a newline
        shown = source.partition("?")[0]
        begin = readable(text, 60)
        raise OSError(f"{shown}: no exporter's /metrics, or not all of it: {begin!r}")
    return text


def metrics_in(text: str) -> "Iterator[tuple[str, dict[str, str], float]]":
    """Yield the name, the labels and the value of each sample in an exporter's text."""
    import re

    # Such as: python_popcon_library_used{library="numpy",namespace="physics"} 12
    string = r'"((?:[^"\\\n]|\\.)*)"'
    name = r"^(?P<name>\w+)"
    labels = r'(?:\{(?P<labels>(?:[^"}\n]|' + string + r")*)\})?"
    value = r" +(?P<value>[-+]?\d+\.?\d*(?:e[-+]?\d+)?)(?!\S)"
    for found in re.finditer("(?m)" + name + labels + value, text):
        pairs = re.findall(r"(\w+)=" + string, found["labels"] or "")
        yield found["name"], dict(pairs), float(found["value"])


class Target:
    """A place that Prometheus scrapes, and the exporters that have run there.

    labels: its labels job and instance
    ignored: names of the labels that do not tell one counter from another. Several
        Prometheus servers may scrape an exporter, and write into one storage. Then each
        of them adds labels of its own.
    lives: one after another, or side by side, as two clusters may use one address
    """

    def __init__(self, labels: "Labels") -> None:
        self.labels = labels
        self.ignored = {"__name__"}
        self.lives: list[Life] = []


class Life:
    """One life of an exporter, from a start to its end. Its counters only rise, from 0.

    scrapes: when it was scraped: the last time before the window, and all times in it
    before: the counters at the last scrape before the window, if there was one
    after: the counters at the last scrape
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.scrapes: list[float] = []
        self.before: dict[Labels, float] = {}
        self.after: dict[Labels, float] = {}


class Prometheus:
    """A server that stores the counters, and the window in which they matter."""

    def __init__(self, options: "argparse.Namespace", now: float) -> None:
        self.options = options
        self.counters = f"__name__={quoted(metric_name())},{options.match}".rstrip(",")
        self.start: float = now - options.window.seconds
        self.end = now

    def counts(self) -> Counts:
        """Return by how much the counters rose in the window.

        PromQL's increase() only estimates that. So take, for each life of an exporter,
        the value at its last scrape, less that at the last scrape before the window.
        Only what was counted after the last scrape of a life is not known.
        """
        every = selector(frozenset(), self.counters)
        form = {"match[]": every, "start": self.start, "end": self.end}
        series = series_of(self.options, "series", form)
        targets = []
        lives = []
        for labels in set(map(target_labels, series)):
            target = self.target_with(labels)
            targets.append(target)
            lives += target.lives
        counts = Counts()
        for life in lives:
            for labels, value in life.after.items():
                rise = value - life.before.get(labels, 0)
                if rise < 0:
                    counts.doubt = ENDED
                    rise = value
                counts.add(library_label(labels), rise)
        # These seem to be unused or rare. If one of their counters ended early, it may
        # have counted more uses, which nobody knows now.
        idle = set()
        for labels in series:
            name = normalized(library_label(labels))
            if name and counts.processes.get(name, 0) <= self.options.at_most:
                idle.add(library_label(labels))
        if idle and any(self.has_lost(idle, target) for target in targets):
            counts.doubt = ENDED
        counts.since = self.reach(lives)
        return counts

    def target_with(self, labels: "Labels") -> Target:
        """Return the target with these labels. Raises OSError if no start is stored."""
        from bisect import bisect

        target = Target(labels)
        starts = selector(labels, f"__name__={quoted(START)}")
        start_series = self.samples(starts, self.start - LOOK_BACK, self.end)
        if not start_series:
            counters = selector(labels, self.counters)
            if self.samples(counters, self.start, self.end, "last_over_time"):
                raise OSError(
                    f"no process_start_time_seconds is stored for {counters}: scrape "
                    "it, too, or leave these counters out by --match"
                )
        lives: dict[float, Life] = {}
        first_series: dict[float, Labels] = {}
        for series, samples in start_series.items():
            for start, times in parted_by_start(samples):
                # Two series with the same start are of one exporter that two servers
                # scrape. These have added the labels that are in one series only.
                first = first_series.setdefault(start, series)
                target.ignored |= {name for name, _ in series ^ first}
                lives.setdefault(start, Life(target)).scrapes += times
        target.lives = list(lives.values())
        for life in target.lives:
            life.scrapes.sort()
            early = bisect(life.scrapes, self.start)
            if early:  # of the scrapes before the window, keep only the last
                del life.scrapes[: early - 1]
                life.before = self.last_values(life, life.scrapes[0])
            life.after = self.last_values(life, life.scrapes[-1])
        return target

    def has_lost(self, libraries: "set[str]", target: Target) -> bool:
        """Tell whether a counter of these libraries ended before its exporter did.

        To count samples makes the server read all of them, so ask only about libraries
        for which it matters.
        """
        import re

        pattern = quoted("|".join(map(re.escape, sorted(libraries))))
        counters = f"{self.counters},library=~{pattern}"
        for life in target.lives:
            begin, end = life.scrapes[0], life.scrapes[-1]
            # Counters that were there until the end. values() does not tell exporters
            # apart that run side by side, so take the counters of all of these.
            last: set[Labels] = set()
            for other in target.lives:
                if other.scrapes[0] <= end and begin <= other.scrapes[-1]:
                    last.update(other.after)
            numbers = self.values(life, counters, begin, end, "count_over_time")
            for counter, number in numbers.items():
                if counter not in last:
                    return True
                # A few samples may get lost on the way to a remote storage. A counter
                # that began in the window has fewer samples anyway.
                has_gap = number < 0.99 * len(life.scrapes)
                if has_gap and counter in life.before:
                    return True
        return False

    def last_values(self, life: Life, scrape: float) -> "dict[Labels, float]":
        """Return the values of an exporter's counters in the scrape at this time.

        All samples of one scrape have the same timestamp.
        """
        return self.values(life, self.counters, scrape, scrape, "last_over_time")

    def values(
        self, life: Life, counters: str, begin: float, end: float, function: str
    ) -> "dict[Labels, float]":
        """Return what a function of PromQL makes of each counter at a life's target."""
        target = life.target
        where = selector(target.labels, counters)
        # Two servers that scrape one exporter store samples each. For count_over_time
        # these are added. At the time of one scrape, only one of them has a sample.
        found: dict[Labels, float] = {}
        for labels, samples in self.samples(where, begin, end, function).items():
            counter = frozenset(one for one in labels if one[0] not in target.ignored)
            found[counter] = found.get(counter, 0) + samples[0][1]
        return found

    def reach(self, lives: "list[Life]") -> float:
        """Return since when uses were counted without a long outage."""
        # Go back in time from life to life, until there is a long gap between two.
        since: float = self.end
        for life in sorted(lives, key=lambda life: -life.scrapes[-1]):
            if life.scrapes[-1] > since - self.options.window.outage:
                since = min(since, life.scrapes[0])
        # An exporter may have run before popcon did. So begin with the first count.
        begin: float = self.end
        for life in sorted(lives, key=lambda life: life.scrapes[0]):
            if since <= life.scrapes[0] < begin:
                begin = min(begin, self.first_count(life))
        return max(begin, self.start, 0.0)

    def first_count(self, life: Life) -> float:
        """Return when an exporter was first scraped with a counter."""
        from bisect import bisect_left

        if life.before:
            return life.scrapes[0]
        if not life.after:
            return self.end

        def has_counters(scrape: float) -> bool:
            return self.last_values(life, scrape) != {}

        # A counter stays until its exporter ends, so bisection finds the first scrape.
        # The last one has counters, and needs no query.
        first = bisect_left(life.scrapes[:-1], True, key=has_counters)
        return life.scrapes[first]

    def samples(
        self, where: str, begin: float, end: float, function: str = ""
    ) -> "dict[Labels, Samples]":
        """Return the samples in a time, or what a function of PromQL makes of them."""
        # One millisecond more, as Prometheus 3 leaves out the begin of a range.
        milliseconds = round((end - begin) * 1000) + 1
        query = f"{function}({where}[{milliseconds}ms])"
        found = series_of(self.options, "query", {"query": query, "time": end})
        return {labels: samples for labels, samples in found.items() if samples}


def selector(labels: "Labels", more: str) -> str:
    """Return the selector, in PromQL, of all series with these labels and more."""
    for name, value in sorted(labels):
        more += f",{name}={quoted(value)}"
    return "{" + more + "}"


def quoted(text: str) -> str:
    """Return a string as PromQL writes it."""
    import json

    return json.dumps(text, ensure_ascii=False)


def library_label(labels: "Labels") -> str:
    """Return the label "library" of a counter, "" if it has none."""
    return dict(labels).get("library", "")


def target_labels(labels: "Labels") -> "Labels":
    """Return those labels of a series that tell where it was scraped."""
    return frozenset(pair for pair in labels if pair[0] in ("job", "instance"))


def parted_by_start(samples: "Samples") -> "list[tuple[float, list[float]]]":
    """Return the lives of an exporter: when each started, and when it was scraped."""
    lives: list[tuple[float, list[float]]] = []
    for when, start in samples:
        if lives:
            known, times = lives[-1]
            lasted = times[-1] - times[0]
            # A new process starts after the last scrape of the old one, so its start is
            # later by more than the old one has lasted. A start that is later by less,
            # or up to a minute earlier, is that of the same process, after its clock
            # was set. Each of the two starts may be wrong by one second, so a new
            # process may seem to start up to two seconds too early.
            if start == known or known - 60 < start <= known + lasted - 2:
                times.append(when)
                continue
        lives.append((start, [when]))
    return lives


def series_of(
    options: "argparse.Namespace", path: str, form: "dict[str, Any]"
) -> "dict[Labels, Samples]":
    """Return the series that Prometheus' HTTP API answers with. Raises OSError."""
    import json

    url = f"{options.prometheus.rstrip('/')}/api/v1/{path}"
    # By default VictoriaMetrics leaves out what it received in the last 30 seconds.
    text = fetch(url, {**form, "nocache": 1, "latency_offset": "1ms"}, options)
    try:
        answer = json.loads(text)
        found = dict(series_in(answer["data"]))
        # Thanos and Mimir warn if a part of their data cannot be reached.
        lost = list(answer.get("warnings", ()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        shown = readable(text, 60)
        odd = f"does not answer as Prometheus does, but {shown!r}; {IS_EXPORTER}"
        raise OSError(f"{url} {odd}") from None
    if lost:
        raise OSError(f"{url} does not know all: {lost[0]}")
    return found


def series_in(data: "Any") -> "Iterator[tuple[Labels, Samples]]":
    """Yield the series in an answer, with their samples."""
    if isinstance(data, list):  # /series answers with a list of labels alone
        for labels in data:
            yield as_labels(labels), []
        return
    for series in data["result"]:
        values = series.get("values")  # of a range; an instant has one value
        if values is None:
            values = [series["value"]]
        samples = []
        for when, text in values:
            # This leaves out NaN, too, as all comparisons with it are false. NaN is no
            # value: it marks where a series ended.
            if abs(when) < 1e12 and abs(float(text)) < 1e12:
                samples.append((float(when), float(text)))
        yield as_labels(series["metric"]), samples


def as_labels(metric: "dict[str, Any]") -> "Labels":
    return frozenset((name, str(value)) for name, value in metric.items())


def fetch(url: str, form: "dict[str, Any]", options: "argparse.Namespace") -> str:
    """Return what a web server answers to a form, or without one. Raises OSError."""
    import re
    from http.client import HTTPException
    from urllib import request as web
    from urllib.parse import urlencode

    if not re.fullmatch(r"https?://[^/?@\s]+(/[!-~]*)?", url):
        if "@" in url:
            raise OSError("a password is given as --header @FILE, not in the URL")
        words = "of ASCII characters without spaces"
        raise OSError(f"a URL must be as http://host:9102/metrics, {words}")
    shown = url.partition("?")[0]
    query = urlencode(form)
    body = None
    if len(query) > 2000:  # too long for a URL
        body = query.encode()
    elif query:
        url = f"{url}?{query}"
    request = web.Request(url, body, headers(options))
    # urlopen() would follow redirects to other servers, and send the headers there,
    # which may hold a secret. So use only these of its handlers. Without the others, an
    # answer with another status than 200 is returned as well, and not raised.
    opener = web.OpenerDirector()
    for handler in web.ProxyHandler, web.HTTPHandler, web.HTTPSHandler:
        opener.add_handler(handler())
    opener.add_handler(web.UnknownHandler())  # raises URLError for an unknown scheme
    try:
        with opener.open(request, timeout=120) as answer:
            text: str = answer.read(ANSWER_LIMIT).decode("utf-8", "replace")
            if answer.length or answer.read(1):  # length: what is still to come
                raise OSError("its answer is cut off, or has no end")
    except (OSError, ValueError, HTTPException) as error:
        why = getattr(error, "reason", error)
        raise OSError(f"{shown} cannot be read: {why}") from None
    if answer.status != 200:
        why = told_error(text)
        if answer.status == 404 and options.prometheus:
            why = IS_EXPORTER
        said = f"{shown} answers {answer.status} {answer.reason}: {why}"
        raise OSError(said.rstrip(": "))
    return text


def told_error(text: str) -> str:
    """Return the error message in an answer of Prometheus, which is JSON."""
    import json

    try:
        return str(json.loads(text)["error"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


def headers(options: "argparse.Namespace") -> "dict[str, str]":
    """Return the headers of --header. Raises OSError, which does not show them."""
    import re

    found: dict[str, str] = {}
    for text in options.header:
        if text.startswith("@"):
            with open(text[1:], encoding="utf-8", errors="replace") as file:
                text = file.read()
        pairs = re.findall(r"(?m)^[ \t]*([\w-]+)[ \t]*:[ \t]*([ -~]*)$", text)
        if not pairs:
            raise OSError("--header must be 'Name: value', or @FILE with such lines")
        found.update(pairs)
    return found


# -- what is installed

# These may be in use though nobody imports them: they host the sessions, install the
# others, or are loaded before counting begins.
HOSTS = """
    conda ipykernel ipython jupyter jupyter-client jupyter-server jupyterhub jupyterlab
    mamba nbclassic notebook pip popcon popularity-contest setuptools uv voila wheel
"""
SCRIPTS = {"console_scripts", "gui_scripts"}
# A process that calls one of these ends, or becomes another program, without a report.
ENDS = b"execv execl os._exit os.abort raise_signal kill(os.getpid()".split()
# Kinds of files, told by their paths in RECORD. The first one that matches is taken.
KINDS = r"""(?x)
    (?P<start> [^/]+ (?: \.pth | \.start | customize\.py ) $ )
  | (?P<server> .* \b etc/jupyter/jupyter_ )
  | (?P<jupyter> .* \b (?: etc | share ) /jupyter/ )
  # In bin/ beside the modules, where pip --target puts it, or as ../../../bin/ or
  # /usr/bin/, but not in a bin/ within a package.
  | (?P<command> (?: \.{0,2} / (?: .*/ )? )? (?: bin | Scripts ) / [^/]+ $ )
  | (?P<bytecode> .* \b __pycache__ / )  # of modules, or of commands
  # Other libraries may load these by their paths. No other uses those in NAME.libs/.
  | (?P<shared> (?! .* \. (?: dy )? libs/ ) (?: .*/ )? (?:
        lib (?! .* \. (?: cpython | abi3 | pypy ) ) [^/]* \.so [\d.]*
        | [^/]* \. (?: dll | dylib ) ) $ )
  # owners() does not find modules by a path with a backslash, or with . or .. in it.
  | (?P<odd> (?: .* \\ | (?: .*/ )? \.{0,2} / ) .* \. (?: py[cd]? | so ) $ )
  | (?P<module> .* \. (?: py[cd]? | so ) $ )
"""
IS_HOST = "runs sessions, or installs"
IS_SERVER = "serves Jupyter"
IS_KERNEL = "extends ipykernel"
IS_COMMAND = "its commands do not report"
# The processes of a library with one of these reasons may import things unnoticed.
SILENT = {IS_HOST, IS_SERVER, IS_KERNEL, IS_COMMAND}
REASONS_BY_KIND = {
    "start": "takes part in every start",
    "server": IS_SERVER,
    "jupyter": "extends Jupyter",
    "odd": "odd paths in its RECORD",
    "shared": "holds shared libraries",
}


class Library:
    """A library that was counted, and the verdict on it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.version: str | None = None
        self.size: int | None = None  # bytes; None if there is no RECORD
        self.was_asked_for = False  # by name, on a command line or in a list
        self.reasons: list[str] = []  # why it may be in use though nobody imports it
        # judged() sets these:
        self.processes: int | None = 0  # that used it; None: fewer than --at-least
        self.status = "absent"  # README lists what it may be
        self.section = "absent"  # of the table: the status, or "rare"
        self.required_by: list[str] = []  # libraries that stay, and require it
        self.brought_by: list[str] = []  # libraries that can go, and require it
        self.row_name = name  # of its row of the table, which several may share

    def as_json(self) -> "dict[str, Any]":
        reason = ""
        if self.status == "unknown":
            reason = self.reasons[0]
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


class InstalledLibrary(Library):
    """A library as a distribution's metadata describe it.

    files: their kinds, by full paths with "/"
    top_levels: names of its modules and packages
    entry_point_groups: such as console_scripts
    """

    def __init__(self, distribution: Distribution) -> None:
        import re

        folder = distribution.folder
        info = distribution.info
        # Such as foo-1.0.dist-info, foo-1.0-py3.11.egg-info, foo.egg-info or EGG-INFO.
        stem, _, rest = info.rpartition(".")[0].partition("-")
        super().__init__(distribution.name() or normalized(stem) or readable(info, 60))
        self.distribution = distribution
        self.version = rest.partition("-")[0]
        if not self.version:
            self.version = readable(distribution.field("version"), 60)
        paths = listed_paths(decoded(distribution.read("RECORD"))) - {""}
        self.files: dict[str, str | None] = {}
        for path in paths:
            kind = re.match(KINDS, path)
            full = os.path.normpath(os.path.join(folder, path)).replace(os.sep, "/")
            self.files[full] = kind and kind.lastgroup
        if paths:
            self.size = sum(map(size_of_file, self.files))
        self.top_levels = top_levels(paths)
        self.requirements = all_requirements(distribution)
        entry_points = decoded(distribution.read("entry_points.txt"))
        groups = re.findall(r"(?m)^[ \t]*\[[ \t]*([^]\s]+)", entry_points)
        self.entry_point_groups = set(groups)
        self.was_asked_for = os.path.exists(os.path.join(folder, info, "REQUESTED"))
        self.reasons = list(reasons_of(self))

    def paths(self, kind: str) -> "list[str]":
        """Return its files of this kind."""
        return [path for path in self.files if self.files[path] == kind]


def size_of_file(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def reasons_of(library: InstalledLibrary) -> "Iterator[str]":
    """Yield why a library may be in use though nobody imports it.

    Only the first reason is shown.
    """
    kinds = set(library.files.values())
    if library.name in HOSTS.split():
        yield IS_HOST
    if not library.distribution.name():
        yield "editable, or has no name"
    if not kinds:
        yield "has no RECORD of its files"
    for kind, reason in REASONS_BY_KIND.items():
        if kind in kinds:
            yield reason
    if "module" not in kinds:
        yield "nothing to import"
    if is_stubs(library):
        yield "holds type stubs"
    for requirement in library.requirements:
        if requirement.name == "ipykernel" and not requirement.only_for:
            yield IS_KERNEL
    own = f"{library.name}-"  # markdown has the group markdown.extensions
    for group in library.entry_point_groups - SCRIPTS:
        if not f"{normalized(group)}-".startswith(own):
            yield "a plug-in, others find it"
            break
    if may_end_unseen(library):
        yield IS_COMMAND


def is_stubs(library: InstalledLibrary) -> bool:
    """Tell whether a library holds type stubs for another one (PEP 561)."""
    if "Classifier: Typing :: Stubs Only" in library.distribution.header():
        return True
    for name in library.top_levels:
        if name.endswith("-stubs") and name[:-6] not in library.top_levels:
            return True
    return False


def may_end_unseen(library: InstalledLibrary) -> bool:
    """Tell whether it is a program whose processes may end without a report."""
    commands = library.paths("command")
    modules = library.paths("module")
    has_scripts = not SCRIPTS.isdisjoint(library.entry_point_groups)
    is_command = has_scripts or commands != []
    is_runnable = any(path.endswith("/__main__.py") for path in modules)  # by -m
    if not is_command and not is_runnable:
        return False
    # Where only sessions report, no command does.
    if is_command and not everyone_reports():
        return True
    # What has plug-ins of its own may be a server, which gets killed in the end. So
    # python-lsp-server has a package pylsp, and entry points of the group pylsp.
    has_plugins = not library.entry_point_groups.isdisjoint(library.top_levels)
    if is_command and has_plugins:
        return True
    for path in commands:
        # Of a command that is not written in Python, nothing is known.
        if b"python" not in read(path).partition(b"\n")[0]:
            return True
    return any(map(may_end_process, commands + modules))


def may_end_process(path: str) -> bool:
    """Tell whether a source file may end its process without a report."""
    if path.endswith((".so", ".pyd", ".pyc")) or "/tests/" in path:
        return False
    text = read(path)
    return any(end in text for end in ENDS)


def words_of_settings() -> "set[str]":
    """Return the words in Jupyter's and IPython's settings, without comments."""
    import re
    from glob import escape, glob

    words = set()
    for prefix in (sys.prefix, "/usr/local", "/usr", "/"):
        for below in ("etc/ipython", "etc/jupyter", "share/jupyter/kernels"):
            for path in glob(f"{escape(prefix)}/{below}/**", recursive=True):
                if is_popcon(path):
                    continue
                text = re.sub(r"(?m)^[ \t]*#.*", "", text_of(path))
                words.update(re.findall(r"\w+", text))
    return words


# -- who requires what

# All extras of a library whose processes do not report: any of them may be in use.
ANY_EXTRA = "*"


class Requirement:
    """What a line of Requires-Dist asks for (PEP 508)."""

    def __init__(self, text: str) -> None:
        import re

        what, _, marker = text.partition(";")
        # "foo[bar,baz] >=1.0" has the words foo, bar, baz and 1.0. That a version gets
        # among the extras does no harm.
        words = re.split(r"[^\w.-]+", what.strip())
        self.name = normalized(words[0])
        self.extras = {""}
        self.extras.update(map(normalized, words[1:]))
        # The extras for which it is required; if there are none, it always is. To be
        # safe, all other conditions in the marker are taken to be true.
        self.only_for: set[str] = set()
        # If one of the alternatives in a marker names no extra, it may always be true.
        extra = r"""\bextra\s*==\s*["']([\w.-]+)"""
        ways = [re.findall(extra, way) for way in re.split(r"\bor\b", marker)]
        if all(ways):
            for named in ways:
                self.only_for.update(map(normalized, named))


def all_requirements(distribution: Distribution) -> "list[Requirement]":
    """Return what a distribution requires, by its metadata or its requires.txt.

    That includes what only its extras require.
    """
    import re

    header = "\n".join(distribution.header())
    lines = re.findall("(?im)^requires-dist:(.*)", header)
    marker = ""
    for line in decoded(distribution.read("requires.txt")).split("\n"):
        if line.startswith("["):  # [extra:marker], for the lines that follow
            extra = line.strip("[]").partition(":")[0]
            marker = f"; extra == {extra!r}"
        elif line:
            lines.append(line + marker)
    return list(map(Requirement, lines))


class Environment:
    """What is installed.

    libraries: by their names
    requirements: what each name requires, by all metadata with that name, also those of
        source trees, and of copies that an earlier folder on sys.path hides
    """

    def __init__(self) -> None:
        self.libraries: dict[str, InstalledLibrary] = {}
        self.requirements: dict[str, list[Requirement]] = {}
        owner: dict[str, str] = {}
        for distribution in distributions():
            library = InstalledLibrary(distribution)
            name = library.name
            self.requirements.setdefault(name, []).extend(library.requirements)
            is_source_tree = not distribution.folder.endswith(("-packages", ".egg"))
            if library.size is None and is_source_tree:
                continue
            if name in self.libraries:  # an earlier folder hides this one
                continue
            self.libraries[name] = library
            for path in library.paths("module") + library.paths("command"):
                # If two libraries share a file, removing one would break the other.
                other = owner.setdefault(path, name)
                if other != name:
                    self.requirements[name].append(Requirement(other))
                    self.requirements[other].append(Requirement(name))
        doubt_requests(self.libraries.values())

    def required(
        self, names: "Iterable[str]"
    ) -> "tuple[dict[str, set[str]], dict[str, set[str]]]":
        """Find all that these names require, and what that requires, and so on.

        Return two dictionaries. The first maps a library to those that require it. The
        second maps a library to those that require it only for one of their extras, and
        whose processes do not report, so that nobody knows whether the extra is in use.
        """
        needed: dict[str, set[str]] = {}
        optional: dict[str, set[str]] = {}
        queue = []
        for name in names:
            queue.append((name, ""))
            library = self.libraries.get(name)
            if library is not None and not SILENT.isdisjoint(library.reasons):
                queue.append((name, ANY_EXTRA))
        seen = set(queue)
        while queue:
            name, extra = queue.pop()
            for requirement in self.requirements.get(name, ()):
                only_for = requirement.only_for
                is_certain = not only_for or extra in only_for
                is_itself = requirement.name == name
                if not is_certain and (extra != ANY_EXTRA or is_itself):
                    continue  # it is required for other extras only
                graph = needed
                if not is_certain:
                    graph = optional
                if not is_itself:
                    graph.setdefault(requirement.name, set()).add(name)
                asked = {(requirement.name, one) for one in requirement.extras}
                queue += asked - seen
                seen |= asked
        return needed, optional


def doubt_requests(libraries: "Iterable[InstalledLibrary]") -> None:
    """Ignore REQUESTED if an installer other than pip, such as uv, always writes it."""
    others = []
    for library in libraries:
        if library.distribution.read("INSTALLER").strip() != b"pip":
            others.append(library)
    if all(library.was_asked_for for library in others):
        for library in others:
            library.was_asked_for = False


def distributions() -> "Iterator[Distribution]":
    """Yield all distributions, in the order of sys.path."""
    for folder in dict.fromkeys(map(os.path.realpath, sys.path)):
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            if name.endswith(METADATA_SUFFIXES):
                yield Distribution(folder, name)


# -- the verdict

# The row of the table for libraries that several others, which can go, have brought.
SEVERAL = "(several of these)"


def judged(counts: Counts, options: "argparse.Namespace") -> "list[Library]":
    """Return each library, installed or counted, with the verdict on it, by name."""
    environment = Environment()
    installed = environment.libraries
    add_reasons(installed, counts.doubt, options.keep)
    # What cannot be judged stays, and so do source trees, which are not in installed.
    staying = {name for name in installed if installed[name].reasons}
    staying |= environment.requirements.keys() - installed.keys()
    libraries: dict[str, Library] = dict(installed)
    used_often = set()
    for name, number in counts.processes.items():
        library = libraries.setdefault(name, Library(name))
        library.processes = max(1, round(number))
        if library.processes < options.at_least:
            library.processes = None
        if number > options.at_most:
            used_often.add(name)
    needed, optional = environment.required(staying | counts.processes.keys())
    # Now the same for what stays, or is used often. A library that is neither one of
    # these nor required by them is rarely used.
    often = staying | used_often
    needed_often, optional_often = environment.required(often)
    often |= needed_often.keys() | optional_often.keys()
    for name, library in installed.items():
        library.required_by = sorted(needed.get(name, ()))
        if name in optional:
            names = ", ".join(sorted(optional[name]))
            library.reasons.append(f"optional: {names}")
        library.status = status_of(library)
        library.section = library.status
        if library.status != "unused" and name not in often:
            library.section = "rare"
    find_brought_by(environment, optional)
    return sorted(libraries.values(), key=lambda library: library.name)


def add_reasons(
    installed: "dict[str, InstalledLibrary]", doubt: str, keep: "list[str]"
) -> None:
    """Add reasons that are not in the libraries' own metadata."""
    from fnmatch import filter as matching
    from re import sub

    words = words_of_settings()
    loaded = owners(executed_files(dict(sys.modules)))
    for name, library in installed.items():
        if not words.isdisjoint(library.top_levels):
            library.reasons.append("named in Jupyter's settings")
        if name in loaded:
            library.reasons.append("loaded at every start")
        if doubt:
            library.reasons.append(doubt.partition(":")[0])
    for pattern in keep:
        names = matching(installed, sub("[-_.]+", "-", pattern).lower())
        for name in names:
            installed[name].reasons.append("to be kept")
        if not names:
            note(f"nothing installed is called {pattern!r}, which was to be kept")


def status_of(library: Library) -> str:
    """Return what is known of an installed library."""
    if library.processes != 0:  # None stands for a few
        return "used"
    if library.required_by:
        return "required"
    if library.reasons:
        return "unknown"
    return "unused"


def find_brought_by(environment: Environment, optional: "Iterable[str]") -> None:
    """Find out which libraries were brought by one that can go.

    They are those that it requires, and that nobody asked for by name. If they can go,
    too, they need not be struck from a list, so they share its row of the table.
    """
    installed = environment.libraries
    unused = [library for library in installed.values() if library.status == "unused"]
    brings = {}
    for library in unused:
        needed, _ = environment.required([library.name])
        others = installed.keys() - {library.name}
        brings[library.name] = needed.keys() & others
    # Of two that require each other, the first one here has brought the other.
    unused.sort(
        key=lambda one: (-len(brings[one.name]), not one.was_asked_for, one.name)
    )
    for library in unused:
        if library.brought_by:
            continue
        for name in brings[library.name]:
            other = installed[name]
            if other.was_asked_for or other.required_by or name in optional:
                continue
            if other.status == "unused":
                other.row_name = library.name
                if other.brought_by:
                    other.row_name = SEVERAL
            other.brought_by.append(library.name)


# -- the table

ALL = 10**6  # rows, or columns
# The titles of the sections, and how many rows they have without --all. Those that one
# has to act on have all their rows.
SECTIONS = {
    "used": ("Used, by how many processes", 20),
    "rare": ("Rarely used, by at most {}", ALL),
    "unused": ("Can go", ALL),
    "unknown": ("Cannot be judged", 20),
    "required": ("Needed by others", 0),
    "absent": ("Counted, but not installed here", 5),
}


def table(
    libraries: "list[Library]", counts: Counts, options: "argparse.Namespace"
) -> "list[str]":
    """Return the lines of the table; the conclusion comes last."""
    from shutil import get_terminal_size
    from textwrap import wrap

    width = ALL  # in a pipe nothing is cut
    if os.isatty(1):
        width = max(60, get_terminal_size().columns)
    since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(counts.since))
    here = [library for library in libraries if library.status != "absent"]
    python = f"Python {sys.version.split()[0]} in {sys.prefix}"
    lines = [
        f"{python}: {number_and_size(here)}",
        f"Window: {options.window.text}; counted since {since}",
    ]
    for name in SECTIONS:
        members = [library for library in libraries if library.section == name]
        if members:
            lines += section_lines(name, members, options, width)
    lines.append("")
    for sentence in conclusion(here, counts.doubt, since):
        lines += wrap(sentence, width)
    return lines


def section_lines(
    name: str, members: "list[Library]", options: "argparse.Namespace", width: int
) -> "list[str]":
    """Return the title and the rows of a section of the table."""
    title, limit = SECTIONS[name]
    title = title.format(counted_noun(options.at_most, "process", "processes"))
    lines = ["", f"{title} ({number_and_size(members)})"]
    rows: dict[str, list[Library]] = {}
    for library in members:
        rows.setdefault(library.row_name, []).append(library)
    # In a row, row[0] speaks for all: only those that can go share a row, and none of
    # these was used.
    order = list(rows.values())
    order.sort(key=lambda row: (row[0].processes or 0, total(row)), reverse=True)
    if options.all:
        limit = ALL
    most = order[0][0].processes or 1
    for row in order[:limit]:
        begin = f"  {row[0].row_name:23} {size_text(row):>8}  "
        text = remark(row, options, width - len(begin))
        if name == "used":
            text += "  " + "#" * round(30 * (row[0].processes or 0) / most)
        lines.append(f"{begin}{text}"[:width].rstrip())
    if limit == 0:
        lines[-1] += ": --all lists them"
    elif len(order) > limit:
        lines.append(f"  {len(order) - limit:,} more: --all lists them")
    return lines


def remark(row: "list[Library]", options: "argparse.Namespace", room: int) -> str:
    """Return what a row of the table says after the size."""
    from textwrap import shorten

    first = row[0]
    if first.processes is None:
        return f"<{options.at_least}".rjust(9)
    if first.processes or first.section == "rare":
        return f"{first.processes:>9,}"
    if first.status == "required":
        text = ", ".join(first.required_by)
    elif first.status == "unused":
        text = ", ".join(one.name for one in row if one.name != one.row_name)
        if text:
            text = f"with {text}"
    else:
        text = first.reasons[0]
        if first.brought_by:
            text += "; only for " + ", ".join(sorted(first.brought_by))
    return shorten(text, max(room, 9), placeholder=" ...")


def conclusion(here: "list[Library]", doubt: str, since: str) -> "list[str]":
    """Return sentences: what can go, how that is known, and what else goes along."""
    unused = [library for library in here if library.status == "unused"]
    all_here = counted_noun(len(here), "library", "libraries")
    if not unused:
        return [doubt or f"None of {all_here} can go."]
    to_strike = [library for library in unused if not library.brought_by]
    names = counted_noun(len(to_strike), "name", "names")
    size = size_text(unused)
    all_size = size_text(here)
    who = "process" if everyone_reports() else "session"
    sentences = [
        f"{len(unused)} of {all_here} can go, {size} of {all_size}: "
        f"strike {names} from your list of requirements.",
        f"No {who} that reported has imported them since {since}, "
        "and nothing that stays needs them.",
    ]
    left = [library for library in here if library.status != "unused"]
    lacking = [library.name for library in left if library.brought_by]
    if lacking:
        sentences.append(
            f"Rebuilding without these names also drops {', '.join(lacking)}, which "
            "only came along with them. Some may be in use: add those you need to "
            "requirements.txt."
        )
    return sentences


def number_and_size(libraries: "list[Library]") -> str:
    """Return how many libraries there are, and their size if it is known."""
    text = counted_noun(len(libraries), "library", "libraries")
    size = size_text(libraries)
    if size:
        text += f", {size}"
    return text


def total(libraries: "list[Library]") -> int:
    return sum(library.size or 0 for library in libraries)


def size_text(libraries: "list[Library]") -> str:
    """Return the size of libraries together, "" if it is not known of any."""
    if all(library.size is None for library in libraries):
        return ""
    size = total(libraries) / 1e6
    if size >= 999.5:
        return f"{size / 1000:.1f} GB"
    if size >= 99.95:
        return f"{size:.0f} MB"
    return f"{size:.1f} MB"


# -- its options


def must_match(pattern: str, text: str, words: str) -> None:
    """Raise an error, which argparse prints, if the value of an option is wrong."""
    import re
    from argparse import ArgumentTypeError

    if not re.fullmatch(pattern, text):
        raise ArgumentTypeError(f"{text!r} must be {words}")


def whole_number(text: str) -> int:
    """Return a number of processes."""
    must_match("[0-9]{1,9}", text, "a whole number from 0 up")
    return int(text)


def matchers(text: str) -> str:
    """Return the matchers of --match, which PromQL writes in braces, without these."""
    import re
    from argparse import ArgumentTypeError

    # Leave out the values, so that only names of labels and operators are searched.
    string = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|`[^`]*`)"""
    names = re.sub(rf"(?s)([=!][=~]?)\s*{string}", r"\1", text)
    if re.search(r"""\blibrary\b["'`]?\s*[=!]""", names):
        words = "about other labels: else all other libraries would seem unused"
        raise ArgumentTypeError(f"{text!r} must be {words}")
    must_match(r"(?s)\s*\{.*\}\s*", text, """as in PromQL: '{namespace="prod"}'""")
    return text.strip().removeprefix("{").removesuffix("}").strip(", \t\r\n")


def add_usage_options(parser: "argparse.ArgumentParser") -> None:
    """Add the options of the command usage to its parser.

    A default that is a string goes through `type`, too, as if it had been given.
    """
    add_source_options(parser, required=True)
    add = parser.add_argument
    text = """Take only the counters with these labels: '{namespace="prod"}'."""
    add("--match", type=matchers, default="{}", metavar="LABELS", help=text)
    text = "Look back for so long, in ms, s, m, h, d, w or y (default: 90d)."
    add("--window", type=Window, default="90d", help=text)
    text = "Never say that these libraries can go: names, or patterns as 'azure-*'."
    add("--keep", nargs="+", action="extend", default=[], metavar="NAME", help=text)
    text = "List what at most K processes used as rarely used."
    add("--at-most", type=whole_number, default=0, metavar="K", help=text)
    text = "Show numbers of processes below K as <K, so that they point at nobody."
    add("--at-least", type=whole_number, default=0, metavar="K", help=text)
    add("--all", action="store_true", help="Show all rows.")
    form = parser.add_mutually_exclusive_group()
    text = "Print only the names that can go."
    form.add_argument("--unused", action="store_true", help=text)
    form.add_argument("--json", action="store_true", help="Print all as JSON.")


# ---- the options --------------------------------------------------------------------


def add_source_options(parser: "argparse.ArgumentParser", required: bool) -> None:
    """Add the options that tell where the counts are."""
    source = parser.add_mutually_exclusive_group(required=required)
    text = "Read the counts from Prometheus, for instance at http://prometheus:9090."
    source.add_argument(
        "--prometheus", type=base_url, default="", metavar="URL", help=text
    )
    text = "Read the counts from the file of collect, or an exporter's /metrics."
    source.add_argument("--metrics", default="", metavar="FILE_OR_URL", help=text)
    text = "Send 'Name: value' to the server, or the lines of a file, as @FILE."
    parser.add_argument("--header", action="append", default=[], help=text)


def base_url(text: str) -> str:
    """Return the URL of --prometheus, to which the paths of its API are appended."""
    from argparse import ArgumentTypeError

    for end in "?#":
        if end in text:
            words = f"it must be a base URL, without {end} and what follows it"
            raise ArgumentTypeError(words)
    return text


def command_line() -> "argparse.ArgumentParser":
    """Return the parser. In what it returns, `command` is the function to be called."""
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
        # The docstring of a command is what -h prints. `python -OO` leaves none.
        text = command.__doc__ or ""
        short = text.partition("\n")[0]
        added = commands.add_parser(command.__name__, help=short, description=text)
        added.set_defaults(command=command)
        return added

    text = "Let every Python process of it report."
    add(install).add_argument("--all-processes", action="store_true", help=text)
    add_source_options(add(selftest), required=False)
    add_run_options(add(run))
    add_collect_options(add(collect))
    add_usage_options(add(usage))
    add(uninstall)
    return parser


# ---- main ---------------------------------------------------------------------------


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run a command, and return the exit status.

    A command raises OSError, with a message for the user, if it cannot do its work.
    Then the status is 2. On misuse, argparse exits with 2.
    """
    sys.path[:0] = STANDARD_FOLDERS  # so that no command imports a person's own json.py
    if hasattr(sys.stdout, "reconfigure"):
        # For paths with characters that the encoding does not have.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options = command_line().parse_args(arguments)
        status: int = options.command(options)
        flush_stdout()
        return status
    except KeyboardInterrupt:
        return 130  # as a shell returns for Ctrl-C
    except BrokenPipeError:
        pass  # the reader of the pipe has ended, as with `| head -1`
    except OSError as error:
        note(str(error))
    try:
        flush_stdout()
    except OSError:
        # At exit, Python would try again to write the rest, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 2


def flush_stdout() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
