"""The tests of popcon: `python -m unittest`. They follow the rooms of popcon.py.

Those that need a real server, a kernel, Debian's Python or a large environment are
told where by POPCON_TEST_* variables, as .ci/run sets them, and are skipped without.
"""

from __future__ import annotations

import argparse
import atexit
import configparser
import contextlib
import csv
import importlib.machinery
import importlib.util
import io
import json
import math
import os
import py_compile
import random
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
import unittest
import urllib.parse
import urllib.request
import venv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from xml.etree import ElementTree

import popcon


def paths_in(variable: str) -> list[str]:
    """Return the paths that an environment variable lists, none if it is not set."""
    return [path for path in os.environ.get(variable, "").split(":") if path]


HERE = Path(__file__).resolve().parent
SOURCE = Path(popcon.__file__).resolve()
README = (HERE / "README.md").read_text(encoding="utf-8")
EXPORTER = os.environ.get("POPCON_TEST_STATSD_EXPORTER", "")
STATSD = os.environ.get("POPCON_TEST_STATSD", "")
LARGE = os.environ.get("POPCON_TEST_LARGE", "")
RELATIVES = os.environ.get("POPCON_TEST_RELATIVES", "")
JUPYTER = os.environ.get("POPCON_TEST_JUPYTER", "")
YAML = os.environ.get("POPCON_TEST_PYTHON_YAML", "")
DEBIAN = paths_in("POPCON_TEST_DEBIAN")
OLD_PYTHONS = paths_in("POPCON_TEST_OLD_PYTHONS")
PREFIX = "python_popcon.library_used."
HOST = "PYTHON_POPCONTEST_STATSD_HOST"
DEBUG: dict[str, Any] = {"PYTHON_POPCONTEST_DEBUG": "1"}


def clean_environ(**settings: str) -> dict[str, str]:
    """Return the environment with these settings, and without what could disturb."""
    environ = {"PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    for name, value in os.environ.items():
        if not name.startswith(("PYTHON", "DO_NOT", "POPCON_TEST")):
            environ[name] = value
    environ.update(settings)
    return environ


def readme_blocks(language: str) -> list[str]:
    """Return the code blocks of README in a language."""
    return re.findall(rf"(?ms)^ *```{language}\n(.*?)^ *```$", README)


def readme_block(language: str, start: str) -> str:
    """Return the one code block of README in a language that starts like this."""
    blocks = [block for block in readme_blocks(language) if block.startswith(start)]
    assert len(blocks) == 1, f"README has {len(blocks)} blocks that start with {start}"
    return blocks[0]


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """Return the number of a port that nobody listens on."""
    with socket.socket(socket.AF_INET, kind) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def settings_for(port: int, address: str = "127.0.0.1") -> dict[str, Any]:
    """Return the settings of a process that reports to this address."""
    return {HOST: address, "PYTHON_POPCONTEST_STATSD_PORT": str(port)}


class Server(socket.socket):
    """A statsd server that only listens."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__(family, socket.SOCK_DGRAM)
        self.bind((address, 0))
        self.port = self.getsockname()[1]
        self.settings = settings_for(self.port, address)

    def received(self, wait: float = 0.0) -> list[bytes]:
        """Return the datagrams that came since the last call.

        Loopback delivers a datagram before its sender goes on.

        wait: seconds to wait for one more
        """
        datagrams = []
        self.settimeout(wait)
        with contextlib.suppress(BlockingIOError, TimeoutError):
            while True:
                datagrams.append(self.recv(65536))
        return datagrams

    def names(self, wait: float = 0.0) -> list[str]:
        """Return the libraries that were counted since the last call, sorted.

        A library that was counted twice is there twice.
        """
        names = []
        for datagram in self.received(wait):
            for line in datagram.decode().split("\n"):
                match = re.fullmatch(rf"{re.escape(PREFIX)}([a-z0-9-]+):1\|c", line)
                assert match, line
                names.append(match[1])
        return sorted(names)

    def code_to_ask_it_for_names(self) -> str:
        """Return code after which popcon takes this server for the name server.

        It never answers.
        """
        return textwrap.dedent(f"""
            import popcon
            popcon.NAME_SERVER_PORT = {self.port}
            read_really = popcon.read
            def read(path):
                if path == "/etc/resolv.conf":
                    return b"nameserver 127.0.0.1"
                if path == "/etc/hosts":
                    return b""
                return read_really(path)
            popcon.read = read
            """)


class Ended(NamedTuple):
    """A process that has ended: what it sent and printed, and its exit status."""

    names: list[str]  # of the libraries that it counted, sorted
    out: str
    err: str
    status: int


class Case(unittest.TestCase):
    """A test with a folder of its own.

    site: where a fresh Python finds installed libraries
    own: where it starts, with a person's own modules
    """

    def setUp(self) -> None:
        self.folder = Path(self.open(tempfile.TemporaryDirectory())).resolve()
        self.site = self.folder / "lib" / "site-packages"
        self.own = self.folder / "own"
        self.site.mkdir(parents=True)
        self.own.mkdir()

    def open(self, manager: Any) -> Any:
        """Enter a context, which ends with the test: enterContext() came with 3.11."""
        self.addCleanup(manager.__exit__, None, None, None)
        return manager.__enter__()

    def write(self, folder: Path, files: dict[str, str]) -> None:
        """Write texts to files, by their paths in the folder."""
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def install(
        self,
        name: str,
        *files: str,
        folder: Path | None = None,
        record: str | None = "",
        info: str = "",
        more: dict[str, str] | None = None,
        source: str = "",
    ) -> Path:
        """Install a library of these files as pip does, and return its .dist-info.

        folder: where to install it, instead of self.site
        record: its RECORD, instead of one that lists all files; None for no RECORD
        info: the name of the .dist-info
        more: files in the .dist-info, beside the METADATA or instead of it
        source: the text in each of the files
        """
        folder = folder or self.site
        info = info or re.sub("[-.]+", "_", name) + "-1.0.dist-info"
        header = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        metadata = {"METADATA": f"{header}\nText\nName: not-me\n"}
        metadata.update(more or {})
        self.write(folder / info, metadata)
        self.write(folder, dict.fromkeys(files, source))
        if record == "":
            paths = [f"{info}/{path}" for path in metadata]
            paths.extend(files)
            paths.append(f"{info}/RECORD")
            record = "".join(f"{path},sha256=abc,1\n" for path in paths)
        if record is not None:
            self.write(folder / info, {"RECORD": record})
        return folder / info

    def as_listed(self, folder: Path, names: Iterable[str] = ()) -> Any:
        """Return a context in which Python's own finder has listed a folder.

        names: what it has found there; if there are none, what is there
        """
        finder = importlib.machinery.FileFinder(str(folder))
        found = set(names or os.listdir(folder))
        finder._path_cache = found  # type: ignore[attr-defined]
        return mock.patch.dict(sys.path_importer_cache, {str(folder): finder})

    def owners(self, *modules: str, folder: Path | None = None) -> set[str]:
        """Return the libraries that popcon says own modules.

        modules: their paths in the folder
        folder: instead of self.site
        """
        folder = folder or self.site
        files = {str(folder / path) for path in modules}
        with self.as_listed(folder):
            return set(popcon.owners(files))

    def run_python(
        self,
        code: str,
        *flags: str,
        cwd: Path | None = None,
        python: str = sys.executable,
        arguments: list[str] | None = None,
        **settings: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run code, or the script of that name, in a fresh Python that finds self.site.

        flags: options of Python
        settings: of the environment
        """
        command = [python, *flags]
        if code.endswith(".py"):
            command.append(code)
        else:
            command += ["-c", textwrap.dedent(code)]
        command += arguments or []
        path = os.pathsep.join([str(self.site), str(HERE)])
        return subprocess.run(
            command,
            cwd=cwd or self.own,
            env=clean_environ(**{"PYTHONPATH": path, **settings}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def run_with_popcon(self, code: str, *flags: str, **options: Any) -> Ended:
        """Set popcon up in a fresh Python, and run the code to its end."""
        setup = "import popcon; popcon.setup_reporter()\n"
        return self.run_reporting(setup + textwrap.dedent(code), *flags, **options)

    def run_program(self, code: str, *flags: str, **options: Any) -> Ended:
        """Run a program that sets popcon up by itself."""
        self.write(self.own, {"program.py": textwrap.dedent(code)})
        return self.run_reporting("program.py", *flags, **options)

    def run_reporting(self, code: str, *flags: str, **options: Any) -> Ended:
        """Run code or a script, with the settings of a server that counts."""
        with Server() as server:
            settings = {**server.settings, **options}
            result = self.run_python(code, *flags, **settings)
            names = server.names()
        return Ended(names, result.stdout, result.stderr, result.returncode)

    def assert_used(
        self,
        code: str,
        *libraries: str,
        before: str = "",
        printed: str = "",
        **options: Any,
    ) -> None:
        """Check which libraries a fresh interpreter names after it ran the code.

        before: code that it runs before popcon is set up
        printed: the lines that the code prints
        """
        program = [
            "import sys",
            textwrap.dedent(before),
            "import popcon; popcon.setup_reporter()",
            textwrap.dedent(code),
            "print(*sorted(popcon.used_libraries()))",
        ]
        result = self.run_python("\n".join(program), **options)
        self.assertEqual(result.stderr, "")
        self.assertEqual(result.returncode, 0)
        lines = result.stdout.splitlines()
        self.assertEqual(lines.pop().split(), sorted(libraries))
        self.assertEqual(lines, printed.splitlines())

    def assert_sends(
        self,
        code: str,
        *libraries: str,
        out: str = "",
        err: str = "",
        flags: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        """Check what a program sends that runs after popcon was set up, and prints."""
        ended = self.run_with_popcon(code, *flags, **options)
        self.assertEqual(ended, (list(libraries), out, err, 0))

    def start(self, *command: object) -> subprocess.Popen[bytes]:
        """Start a server in the test's folder; it ends with the test."""
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)  # which comes first
        return process

    def wait_until(self, holds: Callable[[], object], tries: int = 300) -> None:
        """Wait until something holds, and raises no OSError.

        tries: how often to look, with a tenth of a second between
        """
        for _ in range(tries):
            with contextlib.suppress(OSError):
                if holds():
                    break
            time.sleep(0.1)

    @contextlib.contextmanager
    def exporter(
        self, place: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[dict[str, Any], Any]]:
        """Start the real statsd_exporter.

        The values are the settings for it, and a function that returns its metrics.

        place: the ports for statsd and for the metrics, if it is to take the place of
            an earlier one, whose function has them as its attribute `place`
        """
        self.write(self.folder, {"mapping.yaml": readme_block("yaml", "mappings:")})
        if not place[0]:
            place = (free_port(socket.SOCK_DGRAM), free_port())
        statsd, port = place
        process = self.start(
            EXPORTER,
            f"--statsd.mapping-config={self.folder / 'mapping.yaml'}",
            f"--statsd.listen-udp=127.0.0.1:{statsd}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--statsd.listen-tcp=",
            "--statsd.read-buffer=4194304",
        )

        def metrics() -> dict[str, float]:
            url = f"http://127.0.0.1:{port}/metrics"
            with urllib.request.urlopen(url, timeout=5) as answer:
                text = answer.read().decode()
            samples = {}
            for line in text.splitlines():
                if not line.startswith("#"):
                    name, _, value = line.rpartition(" ")
                    samples[name] = float(value)
            return samples

        metrics.place = place  # type: ignore[attr-defined]
        self.wait_until(metrics, tries=100)
        yield settings_for(statsd), metrics
        process.kill()
        process.wait()


# ---- sys.modules -> the files that were executed ------------------------------------


class TestWhatCounts(Case):
    def setUp(self) -> None:
        super().setUp()
        self.install("Alpha", "alpha/__init__.py", "alpha/part.py")
        self.install("beta", "beta.py")

    def test_a_package_counts(self) -> None:
        self.assert_used("import alpha.part", "alpha")

    def test_a_single_file_counts(self) -> None:
        self.assert_used("import beta", "beta")

    def test_bytecode_without_its_source_counts(self) -> None:
        for path in list(self.site.rglob("*.py")):
            py_compile.compile(str(path), f"{path}c", doraise=True)
            path.unlink()
        self.assert_used("import alpha, beta", "alpha", "beta")

    def test_a_submodule_counts_whose_package_is_gone(self) -> None:
        code = """
            from alpha import part
            del sys.modules["alpha"]
            """
        self.assert_used(code, "alpha")

    def test_what_was_loaded_before_the_setup_does_not_count(self) -> None:
        self.assert_used("import alpha, beta", "beta", before="import alpha")

    def test_more_of_a_library_that_was_loaded_before_does_not_count(self) -> None:
        self.assert_used("import alpha.part", before="import alpha")

    def test_the_standard_library_does_not_count(self) -> None:
        code = """
            import json, csv, decimal, sqlite3
            import xml.dom.minidom, concurrent.futures
            """
        self.assert_used(code)

    def test_the_standard_library_has_no_executed_files(self) -> None:
        modules = {"json": json, "json.decoder": json.decoder, "os": os}
        self.assertEqual(popcon.executed_files(modules), set())

    def test_the_standard_library_does_not_count_under_another_name(self) -> None:
        self.assertEqual(popcon.executed_files({"by_another_name": os}), set())

    def test_a_module_run_with_m_counts(self) -> None:
        source = "import popcon; print(popcon.used_libraries() & {'tool'})"
        self.install("tool", "tool.py", source=source)
        ended = self.run_python("", "-m", "tool")
        self.assertEqual(ended.stdout, "{'tool'}\n")

    def test_a_script_does_not_count(self) -> None:
        source = "import popcon; print(popcon.used_libraries() & {'tool'})"
        self.install("tool", "tool.py", source=source)
        ended = self.run_python(str(self.site / "tool.py"))
        self.assertEqual(ended.stdout, "set()\n")

    # Extensions

    def install_extension(self) -> str:
        """Install the standard library's _queue as twin._queue, and return its path."""
        extension = f"twin/_queue{importlib.machinery.EXTENSION_SUFFIXES[0]}"
        self.install("twin", extension)
        original = importlib.util.find_spec("_queue")
        assert original is not None
        shutil.copy(str(original.origin), self.site / extension)
        return extension

    def test_an_extension_has_an_owner(self) -> None:
        self.assertEqual(self.owners(self.install_extension()), {"twin"})

    def test_an_extension_counts(self) -> None:
        self.install_extension()
        self.assert_used("import twin._queue", "twin")

    def test_an_extension_that_is_loaded_by_hand_counts(self) -> None:
        self.install_extension()
        code = """
            import importlib.util
            spec = importlib.util.find_spec("twin._queue")
            module = importlib.util.module_from_spec(spec)
            sys.modules["twin._queue"] = module
            spec.loader.exec_module(module)
            """
        self.assert_used(code, "twin")

    # Libraries that share a package

    def install_googles(self) -> None:
        self.install("google-cloud-storage", "google/cloud/storage/__init__.py")
        self.install("google-cloud-bigquery", "google/cloud/bigquery/__init__.py")
        self.install("google-auth", "google/auth/__init__.py")

    def test_of_a_namespace_package_only_the_imported_part_counts(self) -> None:
        self.install_googles()
        self.assert_used("import google.cloud.storage", "google-cloud-storage")

    def test_another_part_of_a_namespace_package_counts_after_the_setup(self) -> None:
        self.install_googles()
        before = "import google.cloud.storage"
        self.assert_used("import google.auth", "google-auth", before=before)

    def install_host_and_guest(self) -> None:
        """Install a library, and a plug-in of it that lies in its package."""
        self.install("host", "host/__init__.py")
        self.install("guest", "host/plugins/guest.py", "guest_tool.py")

    def test_a_guest_in_the_package_of_a_host_does_not_count_for_it(self) -> None:
        self.install_host_and_guest()
        self.assert_used("import host", "host")

    def test_a_guest_in_the_package_of_a_host_counts(self) -> None:
        self.install_host_and_guest()
        self.assert_used("import host.plugins.guest", "host", "guest")

    def test_two_libraries_count_that_list_the_same_file(self) -> None:
        self.install("opencv-python", "cv2/__init__.py")
        self.install("opencv-python-headless", "cv2/__init__.py")
        self.assert_used("import cv2", "opencv-python", "opencv-python-headless")

    def test_a_file_that_no_library_lists_does_not_count(self) -> None:
        self.install_host_and_guest()
        self.write(self.site, {"dropped.py": "", "host/dropped.py": ""})
        self.assert_used("import dropped, host.dropped", "host")

    def test_popcon_itself_does_not_count_and_makes_nobody_read_a_record(self) -> None:
        # install copies it into site-packages, where no RECORD lists it.
        code = """
            import importlib, shutil
            shutil.copy(popcon.__file__, sys.argv[1])
            importlib.invalidate_caches()
            del sys.modules["popcon"]
            import popcon, beta
            assert popcon.__file__.startswith(sys.argv[1])
            def hook(event, arguments):
                if event == "open" and "RECORD" in str(arguments[0]):
                    print(arguments[0].split("/")[-2])
            sys.addaudithook(hook)
            """
        printed = "beta-1.0.dist-info\n"
        site = [str(self.site)]
        self.assert_used(code, "beta", printed=printed, arguments=site)

    # A person's own modules

    def test_own_modules_do_not_count_that_have_the_name_of_a_librarys(self) -> None:
        self.install_host_and_guest()
        self.write(self.own, {"guest_tool.py": "", "mine/__init__.py": ""})
        self.assert_used("sys.path.insert(0, ''); import guest_tool, mine")

    def test_a_source_tree_with_an_egg_info_does_not_count(self) -> None:
        metadata = {"PKG-INFO": "Name: mine\n", "top_level.txt": "mine\n"}
        self.write(self.own / "mine.egg-info", metadata)
        self.write(self.own, {"mine.py": ""})
        self.assert_used("sys.path += ['']; import mine")

    def test_nothing_of_an_egg_info_in_a_source_tree_is_opened(self) -> None:
        self.write(self.own / "mine.egg-info", {"PKG-INFO": "Name: mine\n"})
        self.write(self.own, {"mine.py": ""})
        code = """
            sys.path += [""]
            import mine
            def hook(event, arguments):
                if event == "open" and ".egg-info" in str(arguments[0]):
                    print(arguments[0])
            sys.addaudithook(hook)
            """
        self.assert_used(code)

    def test_a_source_tree_makes_nobody_read_lists_of_packages(self) -> None:
        self.write(self.own, {"mine.py": "", "yours.py": ""})
        self.write(self.own / "mine.egg-info", {"PKG-INFO": "Name: mine\n"})
        self.write(self.own / "yours-1.dist-info", {"METADATA": "Name: yours\n"})
        code = """
            import os
            isdir = os.path.isdir
            os.path.isdir = lambda path: print(path) or isdir(path)
            sys.path += [""]
            import mine, yours
            """
        self.assert_used(code)

    def test_a_source_tree_with_a_dist_info_does_not_count(self) -> None:
        metadata = {"top_level.txt": "mine\n"}
        self.install("mine", "mine.py", folder=self.own, record=None, more=metadata)
        self.assert_used("sys.path += ['']; import mine")

    def test_an_editable_install_does_not_count(self) -> None:
        editable = {"direct_url.json": '{ "dir_info" :\n{ "editable" : true } }'}
        self.install("edited", "__editable___edited_finder.py", more=editable)
        self.assert_used("import __editable___edited_finder")

    def test_a_library_that_was_installed_from_a_folder_counts(self) -> None:
        copied = {"direct_url.json": '{"dir_info": {}}'}
        self.install("copied", "copied.py", more=copied)
        self.assert_used("import copied", "copied")

    # Lazy modules

    SPEC_OF_LAZY_MODULE = """
import importlib.util
spec = importlib.util.find_spec("sleepy")
spec.loader = importlib.util.LazyLoader(spec.loader)
"""
    IMPORT_LAZILY = f"""
{SPEC_OF_LAZY_MODULE}
class Finder:
    def find_spec(name, path, target=None):
        return spec if name == "sleepy" else None
sys.meta_path.insert(0, Finder)
import sleepy
"""
    LOAD_LAZILY = f"""
{SPEC_OF_LAZY_MODULE}
sleepy = importlib.util.module_from_spec(spec)
sys.modules["sleepy"] = sleepy
spec.loader.exec_module(sleepy)
"""

    def check_lazy_module(self, load: str) -> None:
        self.install("sleepy", "sleepy.py", source="value = 1; print('executed')")
        touch = "sleepy.value"
        self.assert_used(load)
        self.assert_used(load + touch, "sleepy", printed="executed")
        self.assert_used(touch, "sleepy", printed="executed", before=load)

    def test_a_lazily_imported_module_counts_when_it_is_touched(self) -> None:
        self.check_lazy_module(self.IMPORT_LAZILY)

    def test_a_lazy_module_that_is_made_by_hand_counts_when_it_is_touched(self) -> None:
        self.check_lazy_module(self.LOAD_LAZILY)

    @unittest.skipUnless(hasattr(os, "fork"), "needs os.fork")
    def test_a_lazy_module_counts_for_the_child_that_touches_it(self) -> None:
        self.install("sleepy", "sleepy.py", source="value = 1")
        child = """
            if os.fork():
                os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
            sleepy.value
            import beta
            """
        code = f"import os\n{self.LOAD_LAZILY}{textwrap.dedent(child)}"
        self.assert_used(code, "beta", "sleepy")

    # What modules make of themselves

    def test_a_module_that_says_it_has_another_file_counts_for_its_own(self) -> None:
        code = """
            import alpha
            alpha.__file__ = "/x/beta.py"
            sys.modules["x.y.z"] = alpha
            """
        self.assert_used(code, "alpha")

    def test_a_module_under_another_name_and_without_a_file_counts(self) -> None:
        code = """
            import alpha
            sys.modules["x"] = sys.modules.pop("alpha")
            del alpha.__file__
            """
        self.assert_used(code, "alpha")

    def test_a_module_that_has_become_of_another_class_counts(self) -> None:
        code = """
            class Module(type(sys)):
                pass
            from alpha import part
            del sys.modules["alpha"]
            part.__class__ = Module
            """
        self.assert_used(code, "alpha")

    def test_a_module_with_the_spec_of_another_counts_for_its_own_file(self) -> None:
        code = """
            import alpha, importlib.util
            alpha.__spec__ = importlib.util.find_spec("beta")
            """
        self.assert_used(code, "alpha")

    def test_a_module_without_a_spec_counts(self) -> None:
        self.assert_used("import alpha; del alpha.__spec__", "alpha")

    def test_a_module_without_a_file_counts_by_its_spec(self) -> None:
        self.assert_used("import alpha; del alpha.__file__", "alpha")

    def test_a_module_whose_loader_of_its_own_sets_the_file_counts(self) -> None:
        code = f"""
            import importlib.machinery
            class Loader:
                def create_module(self, spec):
                    return None
                def exec_module(self, module):
                    module.__file__ = {str(self.site / "beta.py")!r}
            class Finder:
                def find_spec(name, path, target=None):
                    return importlib.machinery.ModuleSpec(name, Loader())
            sys.meta_path.insert(0, Finder)
            import beta
            del sys.meta_path[0]
            import alpha
            """
        self.assert_used(code, "alpha", "beta")

    def test_a_module_without_builtins_counts(self) -> None:
        self.assert_used("import alpha; del alpha.__builtins__", "alpha")

    def test_a_module_whose_file_is_no_string_does_not_count(self) -> None:
        self.assert_used("import alpha; alpha.__file__ = alpha.__spec__.origin = 5")

    def check_module_that_replaces_itself(self, by: str) -> None:
        """Check that a module counts which puts the object `item` in its own place."""
        source = "import sys, types\n"
        source += textwrap.dedent(by)
        source += "\nsys.modules[__name__] = item\n"
        self.install("self", "itself.py", source=source)
        self.assert_used("import itself", "self")

    def test_a_module_counts_that_replaces_itself_by_an_object(self) -> None:
        by = """
            class Self:
                def __getattr__(self, name):
                    sys.exit("executed")
            item = Self()
            """
        self.check_module_that_replaces_itself(by)

    def test_a_module_counts_that_replaces_itself_by_another_module(self) -> None:
        by = """
            class Self(types.ModuleType):
                def function(self):
                    pass
            item = Self("module")
            """
        self.check_module_that_replaces_itself(by)

    def test_a_module_counts_that_replaces_itself_by_a_function(self) -> None:
        self.check_module_that_replaces_itself("def item(): pass")

    def test_a_module_counts_that_replaces_itself_by_a_class(self) -> None:
        by = """
            class item:
                @classmethod
                def function(self):
                    pass
            """
        self.check_module_that_replaces_itself(by)

    def test_a_module_counts_whose_decorators_are_of_another_module(self) -> None:
        by = """
            import contextlib
            class Self:
                @contextlib.contextmanager
                def decorated(self):
                    yield
                def function(self):
                    pass
            item = Self()
            """
        self.check_module_that_replaces_itself(by)

    def test_a_module_counts_that_replaces_itself_by_a_dict(self) -> None:
        by = """
            class Self(dict):
                def __init__(self):
                    self.__dict__ = self
            item = Self()
            """
        self.check_module_that_replaces_itself(by)

    def test_a_module_counts_that_gives_its_spec_to_another(self) -> None:
        by = """
            item = types.ModuleType(__name__)
            item.__spec__ = __spec__
            """
        self.check_module_that_replaces_itself(by)

    def test_a_module_counts_that_gives_its_file_to_another(self) -> None:
        by = """
            item = types.ModuleType(__name__)
            item.__file__ = __file__
            """
        self.check_module_that_replaces_itself(by)

    def test_a_stub_in_the_place_of_a_library_does_not_count(self) -> None:
        code = """
            from unittest.mock import MagicMock
            sys.modules["alpha"] = MagicMock()
            class Stub(type(sys)):
                pass
            sys.modules["beta"] = Stub("beta")
            sys.modules["gamma"] = Stub
            """
        self.assert_used(code)

    def test_a_stub_with_a_spec_was_not_made_by_a_loader(self) -> None:
        spec = importlib.machinery.ModuleSpec("alpha", None)
        stub = importlib.util.module_from_spec(spec)
        self.assertEqual(popcon.executed_files({"alpha": stub}), set())

    def test_a_function_in_the_place_of_a_library_does_not_count(self) -> None:
        self.assert_used("sys.modules['alpha'] = lambda: 0; import beta", "beta")

    def test_an_odd_name_of_the_defining_module_is_not_executed(self) -> None:
        code = """
            class Odd(str):
                def __eq__(self, other):
                    sys.exit("executed")
                __hash__ = str.__hash__
            namespace = {"__name__": Odd("alpha")}
            exec("def function(): pass", namespace)
            class Lazy:
                __dict__ = __module__ = property(lambda self: sys.exit("executed"))
            sys.modules["alpha"] = namespace["function"]
            sys.modules["beta"] = Lazy()
            """
        self.assert_used(code)

    def test_a_submodule_that_replaces_itself_counts_for_no_other_module(self) -> None:
        code = """
            import alpha
            sys.modules["alpha.beta"] = object()
            """
        self.assert_used(code, "alpha")

    # Modules that were made and not executed, as *-nspkg.pth files make them

    MAKE_SHARED = """
import importlib.util
spec = importlib.util.find_spec("shared")
shared = sys.modules["shared"] = importlib.util.module_from_spec(spec)
"""

    def install_shared_package(self) -> None:
        self.install("first", "shared/__init__.py", "shared/first.py")
        self.install("second", "shared/second.py")

    def test_a_module_that_was_only_made_does_not_count(self) -> None:
        self.install_shared_package()
        self.assert_used(f"{self.MAKE_SHARED}import shared.second", "second")

    def test_a_module_that_was_only_made_is_not_in_the_baseline(self) -> None:
        self.install_shared_package()
        self.assert_used("import shared.second", "second", before=self.MAKE_SHARED)
        self.assert_used("import shared.first", "first", before=self.MAKE_SHARED)

    # What is in sys.modules and is no module

    ODD_CLASSES = """
ModuleType = type(sys)
ModuleSpec = type(sys.__spec__)

def execute(*ignored):
    print("executed")
    raise SystemExit(3)

names = "getattribute getattr eq ne hash str repr bool len iter fspath dir call"
methods = {f"__{name}__": execute for name in names.split()}
Odd = type("Odd", (object,), methods)
OddModule = type("OddModule", (ModuleType,), methods)
OddMeta = type("OddMeta", (type,), methods)
OddSpec = type("OddSpec", (ModuleSpec,), methods)
OddClass = OddMeta("numpy", (), {})
OddNamespace = type("OddNamespace", (), {"__dict__": property(execute)})
"""

    def check_that_odd_objects_do_no_harm(self, code: str) -> None:
        """Check that objects in sys.modules are not executed, and that alpha counts."""
        self.install("numpy", "numpy/__init__.py")
        code = self.ODD_CLASSES + textwrap.dedent(code) + "\nimport alpha"
        self.assert_used(code, "alpha")

    def test_objects_in_sys_modules_are_not_executed(self) -> None:
        code = """
            sys.modules["odd1"] = 5
            sys.modules["odd2"] = "numpy"
            sys.modules["odd3"] = Odd()
            sys.modules["odd4"] = OddNamespace()
            sys.modules["odd5"] = OddClass
            sys.modules["odd6"] = object.__new__(OddClass)
            """
        self.check_that_odd_objects_do_no_harm(code)

    def test_odd_modules_are_not_executed(self) -> None:
        code = """
            sys.modules["odd"] = OddModule("numpy")
            sys.modules["without_namespace"] = ModuleType.__new__(ModuleType)
            sys.modules["numpy"] = ModuleType("numpy")
            sys.modules["beta"] = None
            """
        self.check_that_odd_objects_do_no_harm(code)

    def test_a_module_that_was_never_initialized_has_no_namespace(self) -> None:
        module = types.ModuleType.__new__(types.ModuleType)
        self.assertEqual(popcon.namespace_of(module), {})
        self.assertEqual(popcon.namespace_of(object()), {})

    def test_modules_with_odd_specs_are_not_executed(self) -> None:
        code = """
            spec = ModuleSpec("spec", None)
            spec.name = spec.origin = Odd()
            spec.has_location = True
            for name, its_spec in [("one", spec), ("two", OddSpec("x", None))]:
                sys.modules[name] = ModuleType(name)
                sys.modules[name].__spec__ = its_spec
            sys.modules["three"] = ModuleType("three")
            sys.modules["three"].__spec__ = spec
            sys.modules["three"].__file__ = "/x.py"
            """
        self.check_that_odd_objects_do_no_harm(code)

    def test_modules_with_odd_attributes_are_not_executed(self) -> None:
        code = """
            odd = sys.modules["odd"] = ModuleType("odd")
            for name in ("spec", "path", "loader", "package", "file"):
                vars(odd)[f"__{name}__"] = Odd()
            """
        self.check_that_odd_objects_do_no_harm(code)

    def test_names_of_modules_that_are_no_strings_do_no_harm(self) -> None:
        code = """
            sys.modules[7] = sys
            sys.modules[("numpy",)] = sys
            sys.modules[None] = sys
            """
        self.check_that_odd_objects_do_no_harm(code)

    # Odd paths

    def test_a_cache_of_finders_that_was_emptied_does_no_harm(self) -> None:
        code = "import alpha; sys.path_importer_cache.clear()"
        self.assert_used(code, "alpha")

    def test_a_finder_that_has_listed_nothing_yet_does_no_harm(self) -> None:
        code = f"""
            import alpha, pkgutil
            sys.path_importer_cache.clear()
            pkgutil.get_importer({str(self.site)!r})
            """
        self.assert_used(code, "alpha")

    def test_a_library_folder_that_is_gone_does_no_harm(self) -> None:
        code = """
            import alpha, types
            odd = sys.modules["odd"] = types.ModuleType("odd")
            odd.__file__ = "/nowhere/site-packages/odd.py"
            """
        self.assert_used(code, "alpha")

    def test_a_cache_without_a_folder_that_ends_with_a_slash_does_no_harm(self) -> None:
        code = f"""
            import alpha
            sys.path.remove({str(self.site)!r})
            sys.path.append({str(self.site) + "/"!r})
            sys.path_importer_cache.clear()
            """
        self.assert_used(code, "alpha")

    def check_that_imports_find_what_comes_later(self, code: str) -> None:
        """Check that an import finds what was written after a report.

        code: has put a folder on sys.path that is not there yet, or is another one
        """
        begin = f"""
import os
os.chdir({str(self.own)!r})
"""
        end = """
popcon.report()
os.makedirs("later/src")
open("later/src/fresh.py", "w").close()
os.chdir("later")
import fresh
"""
        code = "import sys, beta, behind\n" + begin + textwrap.dedent(code) + end
        self.assert_sends(code, "beta")

    def test_a_folder_that_is_made_after_a_report_can_be_imported_from(self) -> None:
        self.write(self.own, {"behind.py": self.REPLACES_ITSELF})
        self.check_that_imports_find_what_comes_later('sys.path.insert(0, "src")')

    def test_a_relative_folder_is_another_one_after_a_change_of_folder(self) -> None:
        self.write(self.own, {"behind.py": self.REPLACES_ITSELF})
        self.write(self.own / "src", {"fresh.py": "sys.exit('the wrong one')"})
        self.check_that_imports_find_what_comes_later('sys.path.append("src")')

    REPLACES_ITSELF = """
import sys
class Self:
    pass
sys.modules[__name__] = Self()
"""

    def test_a_report_lists_no_folder_that_was_not_searched(self) -> None:
        code = f"""
            import alpha
            def tell(event, arguments):
                if event == "os.listdir":
                    print(arguments)
            sys.addaudithook(tell)
            sys.path += ["..", {str(self.folder)!r}, {str(self.folder / "lib")!r}]
            """
        self.assert_used(code, "alpha")

    def test_a_package_that_was_only_looked_through_is_not_listed(self) -> None:
        self.write(self.own / "plug", {"__init__.py": "", "part.py": ""})
        code = """
            import pkgutil, alpha
            sys.path += [""]
            import plug
            list(pkgutil.iter_modules(plug.__path__))
            def tell(event, arguments):
                if event == "os.listdir":
                    print(arguments)
            sys.addaudithook(tell)
            """
        self.assert_used(code, "alpha")

    def test_a_library_counts_that_is_upgraded_after_its_import(self) -> None:
        old = self.install("upgraded", "upgraded.py")
        new = old.with_name("upgraded-2.0.dist-info")
        code = f"""
            import os, upgraded
            os.rename({str(old)!r}, {str(new)!r})
            os.utime({str(self.site)!r}, (0, 0))
            """
        self.assert_used(code, "upgraded")

    def test_a_library_in_any_folder_counts_that_is_upgraded_after_its_import(self) -> None:
        target = self.folder / "target"  # as of pip install --target
        old = self.install("upgraded", "upgraded.py", folder=target)
        new = old.with_name("upgraded-2.0.dist-info")
        code = f"""
            import os
            sys.path.append({str(target)!r})
            import upgraded
            os.rename({str(old)!r}, {str(new)!r})
            os.utime({str(target)!r}, (0, 0))
            """
        self.assert_used(code, "upgraded")

    def test_a_sys_path_that_is_none_does_no_harm(self) -> None:
        self.assert_used("import beta; sys.path = None", "beta")

    def test_odd_entries_on_sys_path_do_no_harm(self) -> None:
        code = """
            import beta
            sys.path[:] = [None, 5, b"x", "", "/nowhere", "/", "relative", "\\0"]
            """
        self.assert_used(code, "beta")

    def check_that_an_odd_file_does_no_harm(self, file: str) -> None:
        """Check that nobody else is asked about a module of this file."""
        code = f"""
            import beta, importlib.metadata, types
            importlib.metadata.packages_distributions = print
            importlib.metadata.distributions = print
            odd = sys.modules["odd"] = types.ModuleType("odd")
            odd.__file__ = {file!r}
            """
        self.assert_used(code, "beta")

    def test_a_file_that_is_no_path_does_no_harm(self) -> None:
        self.check_that_an_odd_file_does_no_harm("<string>")
        self.check_that_an_odd_file_does_no_harm("odd")
        self.check_that_an_odd_file_does_no_harm("beta.py")

    def test_a_file_that_cannot_be_encoded_does_no_harm(self) -> None:
        self.check_that_an_odd_file_does_no_harm("\0/x.py")
        self.check_that_an_odd_file_does_no_harm("/tmp/\ud800/x.py")
        self.check_that_an_odd_file_does_no_harm(f"{self.site}/\ud800.py")

    def test_a_file_below_a_device_or_a_pipe_does_no_harm(self) -> None:
        os.mkfifo(self.folder / "pipe")
        self.check_that_an_odd_file_does_no_harm("/dev/null/x.py")
        self.check_that_an_odd_file_does_no_harm(f"{self.folder}/pipe/x.py")

    def test_a_file_name_that_the_encoding_does_not_hold_counts(self) -> None:
        self.install("accents", "é/__init__.py")
        code = "import os; __import__(os.fsdecode(b'\\xc3\\xa9'))"
        self.assert_used(code, "accents")
        ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        self.assert_used(code, "accents", **ascii_only)

    # Folders on sys.path

    def test_a_folder_in_a_library_that_is_on_sys_path_is_the_librarys(self) -> None:
        self.install("pywin32", "win32/lib/win32con.py")
        folder = str(self.site / "win32" / "lib")
        self.assert_used(f"sys.path += [{folder!r}]; import win32con", "pywin32")

    def test_what_a_library_brings_along_is_the_librarys(self) -> None:
        folder = self.site / "tools" / "_vendor"
        self.install("vendored", "vendored/__init__.py", folder=folder)
        self.install("tools", record="tools/_vendor/vendored/__init__.py,,\n")
        self.assert_used(f"sys.path += [{str(folder)!r}]; import vendored", "tools")

    def test_what_is_installed_into_a_folder_of_a_library_counts(self) -> None:
        folder = self.site / "tools" / "_vendor"
        self.install("tools", "tools/__init__.py")
        self.install("added", "added.py", folder=folder)
        self.assert_used(f"sys.path += [{str(folder)!r}]; import added", "added")

    def install_other_beta(self) -> Path:
        """Install another library with a module beta in a folder, and return that."""
        target = self.folder / "target"
        self.install("beta-two", "beta.py", folder=target)
        return target

    def test_a_library_counts_that_comes_before_another_with_that_module(self) -> None:
        folders = [self.install_other_beta(), self.site, HERE]
        path = os.pathsep.join(str(folder) for folder in folders)
        self.assert_used("import alpha, beta", "alpha", "beta-two", PYTHONPATH=path)

    def test_a_library_counts_whose_folder_has_left_sys_path(self) -> None:
        folder = str(self.install_other_beta())
        code = f"""
            sys.path.insert(0, {folder!r})
            import beta
            del sys.path[0]
            """
        self.assert_used(code, "beta-two")

    def test_a_library_counts_whose_folder_has_a_slash_at_its_end(self) -> None:
        folder = f"{self.install_other_beta()}/"
        self.assert_used(f"sys.path.insert(0, {folder!r}); import beta", "beta-two")
        relative = "../target/"
        self.assert_used(f"sys.path.insert(0, {relative!r}); import beta", "beta-two")

    def test_a_finder_with_an_odd_path_does_no_harm(self) -> None:
        code = """
            class Finder:
                path = 5
            sys.path_importer_cache["/odd"] = Finder()
            sys.path_importer_cache["/none"] = None
            import beta
            """
        self.assert_used(code, "beta")

    def test_a_module_of_another_class_counts_for_the_file_it_names(self) -> None:
        folder = str(self.install_other_beta())
        code = f"""
            class Module(type(sys)):
                pass
            sys.path.insert(0, {folder!r})
            import beta
            del sys.path[0]
            beta.__class__ = Module
            del beta.__spec__
            """
        self.assert_used(code, "beta-two")

    def test_a_library_counts_whose_folder_was_relative_to_an_earlier_one(self) -> None:
        self.install_other_beta()
        code = """
            sys.path.insert(0, "../target")
            import beta, os
            os.chdir("/")
            """
        self.assert_used(code, "beta-two")


# ---- files -> the libraries that own them -------------------------------------------


def normalized_simply(name: str) -> str:
    """Return a name as PEP 503 normalizes it, by its own regular expression."""
    return re.sub("[-_.]+", "-", name).lower()


class TestMetadata(Case):
    # RECORD

    def check_record(self, record: str, lists: bool) -> None:
        """Check whether a RECORD lists a/b.py. It lists neither b.py nor d.txt."""
        with self.subTest(record=record):
            self.install("alpha", record=record)
            self.assertEqual(self.owners("a/b.py") == {"alpha"}, lists)
            self.assertEqual(self.owners("b.py", "d.txt"), set())

    def test_a_record_lists_paths_in_the_first_field_of_its_lines(self) -> None:
        self.check_record("a/b.py\n", lists=True)
        self.check_record("a/b.py,sha256=x,1\n", lists=True)
        self.check_record("c.py,,\na/b.py,,\nd/e.py,,\n", lists=True)
        self.check_record("zzz.py,,\nc/b.py,,\na/b.py,,\nd/e.py,,", lists=True)

    def test_a_record_may_have_quotes(self) -> None:
        self.check_record('"a/b.py","sha256=x","1"\n', lists=True)
        self.check_record('x,,\n"a/b.py",,\n', lists=True)
        self.check_record('"q""uoted",,\na/b.py,,', lists=True)
        self.check_record('"c,d.txt",sha256=x,1\na/b.py,sha256=y,2\n', lists=True)

    def test_a_record_may_have_the_line_ends_of_windows(self) -> None:
        self.check_record("a/b.py\r\n", lists=True)
        self.check_record("a/b.py,,\r\nc.py,,\r\n", lists=True)
        self.check_record("c.py,,\r\na/b.py,,\r\n", lists=True)

    def test_a_path_that_looks_like_it_is_another(self) -> None:
        self.check_record("a/b.pyi,,\na/b.py.bak,,\na/b.py#,,\n", lists=False)
        self.check_record("a/bb.py,,\naa/b.py,,\nx/a/b.py,,\n", lists=False)

    def test_a_path_with_a_form_feed_is_another(self) -> None:
        self.check_record("a\x0ca/b.py,,\n", lists=False)

    def test_a_path_with_a_comma_is_another(self) -> None:
        self.check_record('"x,a/b.py",,\n"a/b.py,x",,\n', lists=False)

    def test_a_path_with_a_quote_is_listed(self) -> None:
        self.install("alpha", record='"a/q""b.py",,\n')
        self.assertEqual(self.owners('a/q"b.py'), {"alpha"})

    # Whose RECORD is read: the names of library and module are less and less alike

    def check_library(self, name: str, module: str) -> None:
        """Check that a library owns its module, among others that do not."""
        self.install("unlike", "something/else.py")
        self.install("bare", record=None)
        self.install(name, module)
        self.assertEqual(self.owners(module), {normalized_simply(name)})

    def test_a_module_with_the_name_of_its_library_has_an_owner(self) -> None:
        self.check_library("Ruamel.YAML-clib", "ruamel_yaml_clib/__init__.py")

    def test_a_module_with_a_part_of_the_librarys_name_has_an_owner(self) -> None:
        self.check_library("python-dateutil", "dateutil/__init__.py")

    def test_a_module_with_letters_of_the_librarys_name_has_an_owner(self) -> None:
        self.check_library("scikit-learn", "sklearn/base.py")

    def test_a_module_in_a_folder_with_the_librarys_name_has_an_owner(self) -> None:
        self.check_library("protobuf", "google/protobuf/message.py")

    def test_a_module_with_nothing_of_the_librarys_name_has_an_owner(self) -> None:
        self.check_library("opencv", "zzz/__init__.py")

    def test_modules_of_many_packages_have_owners(self) -> None:
        names = ["bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel"]
        for name in names:
            self.install(name, f"module_{name}.py")
        modules = [f"module_{name}.py" for name in names]
        self.assertEqual(self.owners(*modules), set(names))

    def records_read(self, new: list[str], earlier: Iterable[str] = ()) -> list[str]:
        """Return the .dist-info of all RECORDs that are read, sorted.

        new: modules, by their paths in self.site
        earlier: those of the baseline
        """
        infos = []

        def read(path: str) -> bytes:
            if path.endswith("RECORD"):
                infos.append(Path(path).parent.name.removesuffix("-1.0.dist-info"))
            return really(path)

        really = popcon.read
        files = {str(self.site / path) for path in new}
        earlier = {str(self.site / path) for path in earlier}
        reading = mock.patch.object(popcon, "read", read)
        with self.as_listed(self.site), reading:
            popcon.owners(files, earlier)
        return sorted(infos)

    def install_various(self) -> None:
        self.install("numpy", "numpy/__init__.py")
        self.install("PyYAML", "yaml/__init__.py")
        self.install("scikit-learn", "sklearn/__init__.py")
        self.install("protobuf", "google/protobuf/__init__.py")
        self.install("google-auth", "google/auth/__init__.py")
        self.install("unlike", "something.py")

    def test_only_the_record_is_read_of_a_library_with_the_modules_name(self) -> None:
        self.install_various()
        self.assertEqual(self.records_read(["numpy/__init__.py"]), ["numpy"])
        self.install("six", "six.py")
        self.assertEqual(self.records_read(["six.py"]), ["six"])

    def test_of_libraries_with_similar_names_the_namesakes_record_is_read(self) -> None:
        self.install("numpy", "numpy/__init__.py")
        self.install("numpy-financial", "numpy_financial.py")
        self.assertEqual(self.records_read(["numpy/__init__.py"]), ["numpy"])
        self.install("six", "six.py")
        self.install("six-more", "six_more.py")
        self.assertEqual(self.records_read(["six.py"]), ["six"])
        self.install("Ruamel.YAML", "ruamel_yaml.py")
        self.install("ruamel.yaml.clib", "ruamel_yaml_clib.py")
        self.assertEqual(self.records_read(["ruamel_yaml.py"]), ["Ruamel_YAML"])

    def test_a_name_is_similar_that_has_all_letters_of_a_modules(self) -> None:
        self.assertTrue(popcon.has_letters("scikitlearn", "sklearn"))
        self.assertTrue(popcon.has_letters("pythondateutil", "dateutil"))
        self.assertFalse(popcon.has_letters("scikitlearn", "slk"))
        self.assertFalse(popcon.has_letters("scikitlearn", "sklearnx"))
        self.assertFalse(popcon.has_letters("scikitlearn", "ktn"))

    def test_the_short_name_of_a_library_has_no_separators_or_version(self) -> None:
        def short_name(info: str) -> str:
            return popcon.Distribution("folder", info).short_name

        self.assertEqual(short_name("Ruamel.YAML_clib-1.0.dist-info"), "ruamelyamlclib")
        self.assertEqual(short_name("some_egg-1.0-py3.egg-info"), "someegg")
        self.assertEqual(short_name("some_egg.egg-info"), "someegg")

    def test_only_records_are_read_of_libraries_with_similar_names(self) -> None:
        self.install_various()
        self.assertEqual(self.records_read(["yaml/__init__.py"]), ["PyYAML"])
        read = self.records_read(["sklearn/__init__.py"])
        self.assertEqual(read, ["scikit_learn"])

    def test_only_the_record_is_read_of_a_library_that_the_path_names(self) -> None:
        self.install_various()
        read = self.records_read(["google/protobuf/__init__.py"])
        self.assertNotIn("numpy", read)
        self.assertIn("protobuf", read)

    def test_each_record_is_read_once_where_no_name_leads_on(self) -> None:
        self.install_various()
        read = self.records_read(["numpy/__init__.py", "something.py"])
        self.assertEqual(len(read), 6)
        self.assertEqual(len(set(read)), 6)

    def test_what_python_runs_at_its_start_is_of_no_library(self) -> None:
        module = types.ModuleType("sitecustomize")
        module.__file__ = str(self.site / "sitecustomize.py")
        names = ("sitecustomize", "usercustomize", "_distutils_hack.override")
        files = popcon.executed_files(dict.fromkeys(names, module))
        self.assertEqual(files, set())

    def test_setuptools_counts_though_python_runs_a_part_of_it_at_its_start(self) -> None:
        hack = "def add_shim(): pass\n"  # the real one is called by a .pth file
        files = ("_distutils_hack/__init__.py", "setuptools.py")
        self.install("setuptools", *files, source=hack)
        start = "import _distutils_hack"
        self.assert_used("import setuptools", "setuptools", before=start)
        self.assert_used(start)

    def test_no_record_is_read_for_what_was_loaded_before(self) -> None:
        self.install_various()
        read = self.records_read(["numpy/__init__.py"], earlier=["dropped.py"])
        self.assertEqual(read, ["numpy"])

    # The name of a library

    def test_names_are_normalized_as_pep_503_says(self) -> None:
        self.assertEqual(popcon.normalized("zope.event"), "zope-event")
        self.assertEqual(popcon.normalized("A__b-.c"), "a-b-c")
        self.assertEqual(popcon.normalized("PyYAML"), "pyyaml")
        self.assertEqual(popcon.normalized("2to3"), "2to3")
        self.assertEqual(popcon.normalized(" x \n"), "x")
        self.assertEqual(popcon.normalized("-x."), "x")

    def check_invalid_name(self, name: str) -> None:
        with self.subTest(name=name):
            self.assertEqual(popcon.normalized(name), "")

    def test_a_name_without_letters_is_invalid(self) -> None:
        self.check_invalid_name("")
        self.check_invalid_name("-")

    def test_a_name_with_other_characters_is_invalid(self) -> None:
        self.check_invalid_name("a b")
        self.check_invalid_name("a/b")
        self.check_invalid_name("a:1|c\nb")

    def test_a_name_with_letters_beyond_ascii_is_invalid(self) -> None:
        self.check_invalid_name("é")
        self.check_invalid_name("\N{KELVIN SIGN}afka")
        self.check_invalid_name("\N{SUPERSCRIPT TWO}")

    def test_an_endless_name_is_invalid(self) -> None:
        self.assertEqual(popcon.normalized("x" * 200), "x" * 200)
        self.check_invalid_name("x" * 201)

    def check_name(self, metadata: str, name: str) -> None:
        """Check the name that a METADATA gives to its library, "" for none."""
        with self.subTest(metadata=metadata[:30]):
            more = {"METADATA": metadata}
            info = self.install("x", "x.py", info="y-1.0.dist-info", more=more)
            distribution = popcon.Distribution(str(self.site), info.name)
            self.assertEqual(distribution.name(), name)
            self.assertEqual(self.owners("x.py"), {name} - {""})

    def test_the_name_is_that_of_the_metadata(self) -> None:
        self.check_name("Name: Real.Name\n", "real-name")
        self.check_name(f"Summary: {'x' * 5000}\nname:   far\n", "far")

    def test_the_name_is_found_behind_empty_lines(self) -> None:
        self.check_name("\nMetadata-Version: 2.1\nName: blank\n", "blank")
        self.check_name("\n\nName: two\n", "two")
        self.check_name("\r\n\r\nName: crlf\r\n\r\nName: x\r\n", "crlf")

    def test_a_name_in_the_description_is_none(self) -> None:
        self.check_name("Version: 1\n\nName: x\n", "")
        self.check_name("Version: 1\r\n\r\nName: x\r\n", "")

    def test_a_library_with_an_invalid_name_has_none(self) -> None:
        self.check_name("Name: evil:1|c\nevil\n", "")
        self.check_name("", "")

    # Requirements

    def check_requirement(self, requirement: str, name: str) -> None:
        """Check the name of what a library requires in these words."""
        metadata = f"Name: x\nRequires-Dist: {requirement}\n\nRequires-Dist: not-me\n"
        info = self.install("x", more={"METADATA": metadata})
        distribution = popcon.Distribution(str(self.site), info.name)
        self.assertEqual(distribution.requirements(), [name])

    def test_the_name_of_a_requirement_ends_before_a_version(self) -> None:
        self.check_requirement("Need.One", "need-one")
        self.check_requirement("need (>=1)", "need")
        self.check_requirement("need(>=1)", "need")
        self.check_requirement("need<2", "need")
        self.check_requirement("need>1", "need")
        self.check_requirement("need==1", "need")
        self.check_requirement("need!=1", "need")
        self.check_requirement("need~=1.0", "need")

    def test_the_name_of_a_requirement_ends_before_an_extra_or_a_marker(self) -> None:
        self.check_requirement("need[fast]", "need")
        self.check_requirement('need;python_version>"3"', "need")
        self.check_requirement('extra-need; python_version > "3"', "extra-need")

    def test_a_requirement_for_an_extra_is_none(self) -> None:
        metadata = "Name: x\nRequires-Dist: need; extra == 'all'\n"
        info = self.install("x", more={"METADATA": metadata})
        distribution = popcon.Distribution(str(self.site), info.name)
        self.assertEqual(distribution.requirements(), [])

    # Files

    def test_of_a_large_file_only_the_beginning_is_read(self) -> None:
        self.write(self.own, {"large": "123456789"})
        with mock.patch.object(popcon, "READ_LIMIT", 5):
            self.assertEqual(popcon.read(str(self.own / "large")), b"12345")

    def test_reading_leaves_no_file_open(self) -> None:
        self.write(self.own, {"file": "x"})
        unused = os.dup(0)
        os.close(unused)
        popcon.read(str(self.own / "file"))
        popcon.read(str(self.own))
        again = os.dup(0)
        os.close(again)
        self.assertEqual(again, unused)

    def test_a_file_that_cannot_be_read_has_no_content(self) -> None:
        self.assertEqual(popcon.read(str(self.own / "missing")), b"")
        self.assertEqual(popcon.read("a\0b"), b"")

    # Rubbish

    def check_rubbish(self, record: bytes, metadata: bytes | None) -> None:
        """Check that a .dist-info of this content does not hide a library that is good.

        Its RECORD is read, since it has the name of the library.
        """
        self.install("good", "good.py")
        info = self.site / f"good-{len(os.listdir(self.site))}.dist-info"
        info.mkdir()
        (info / "RECORD").write_bytes(record)
        if metadata is not None:
            (info / "METADATA").write_bytes(metadata)
        self.assertEqual(self.owners("good.py"), {"good"})

    def test_all_bytes_do_no_harm(self) -> None:
        self.check_rubbish(bytes(range(256)) * 99, bytes(range(256)))
        self.check_rubbish(b"\xff\xfeg\x00o\x00", b"Name: utf16\n")

    def test_a_library_without_metadata_does_no_harm(self) -> None:
        self.check_rubbish(b"good.py,,\n", None)

    def test_a_library_with_an_odd_name_does_no_harm(self) -> None:
        self.check_rubbish(b"good.py,,\n", b"Name: a\x00b\n")
        self.check_rubbish(b"good.py,,\n", "Name: bös\n".encode("latin-1"))

    def test_a_record_with_an_open_quote_does_no_harm(self) -> None:
        self.check_rubbish(b'"x.py\ngood.py\x00,,', b"Name: nul\n")
        self.check_rubbish(b'"' + 200_000 * b"x", b"Name: long\n")

    def test_a_record_with_paths_elsewhere_does_no_harm(self) -> None:
        record = b"/etc/passwd,,\n../../x.py,,\n../good.py,,\n"
        self.check_rubbish(record, b"Name: dots\n")

    def test_a_record_of_empty_lines_does_no_harm(self) -> None:
        self.check_rubbish(b"\n\n,,\n,\n", b"Name: void\n")

    def make_odd_info(self, name: str) -> Path:
        """Make an empty .dist-info that seems to be of the library good."""
        self.install("good", "good.py")
        info = self.site / f"good-{name}.dist-info"
        info.mkdir()
        return info

    def test_an_empty_dist_info_does_no_harm(self) -> None:
        self.make_odd_info("Ünïcode")
        (self.site / ".dist-info").mkdir()
        self.assertEqual(self.owners("good.py"), {"good"})

    def test_a_record_that_is_a_pipe_is_not_waited_for(self) -> None:
        os.mkfifo(self.make_odd_info("pipe") / "RECORD")
        self.assertEqual(self.owners("good.py"), {"good"})

    def test_a_record_that_is_endless_does_no_harm(self) -> None:
        (self.make_odd_info("zero") / "RECORD").symlink_to("/dev/zero")
        self.assertEqual(self.owners("good.py"), {"good"})

    def test_a_record_that_is_a_folder_does_no_harm(self) -> None:
        (self.make_odd_info("folder") / "RECORD").mkdir()
        self.assertEqual(self.owners("good.py"), {"good"})

    def test_a_dist_info_that_is_no_folder_does_no_harm(self) -> None:
        self.install("good", "good.py")
        (self.site / "good-file.dist-info").write_text("where a folder belongs")
        loop = self.site / "good-loop.dist-info"
        loop.symlink_to(loop)
        self.assertEqual(self.owners("good.py"), {"good"})

    def test_what_fails_costs_only_what_depends_on_it(self) -> None:
        self.install("good", "good.py")
        self.install("bare", "bare.py", record=None)
        failing = mock.Mock(side_effect=ZeroDivisionError)
        self.open(mock.patch.object(popcon.Distribution, "header", failing))
        self.assertEqual(self.owners("good.py", "bare.py"), set())
        self.open(mock.patch.object(popcon, "has_letters", failing))
        self.open(mock.patch.object(popcon.Distribution, "name", lambda one: "x"))
        self.assertEqual(self.owners("good.py"), {"x"})

    # Any content

    NAMES = ["a", "b", "a-b", "a_b", "aa", "B", "_a", "é", 'q"', "c,d", "^", "]"]

    def random_paths(self, chance: random.Random) -> list[str]:
        """Return different paths of modules with up to three parts."""
        paths = set()
        for _ in range(30):
            parts = chance.choices(self.NAMES, k=chance.randint(1, 3))
            paths.add("/".join(parts) + ".py")
        return sorted(paths)

    def random_record(self, paths: list[str], chance: random.Random) -> str:
        """Return a RECORD that lists the paths, in one of the ways of CSV."""
        out = io.StringIO()
        dialect = chance.choice(["excel", "unix"])
        end = chance.choice(["\n", "\r\n"])
        writer = csv.writer(out, dialect, lineterminator=end)
        for path in paths:
            writer.writerow([path, chance.choice(["", "sha256=a-_"]), ""])
        return out.getvalue() or "x,,"

    def test_random_records_agree_with_what_was_written(self) -> None:
        chance = random.Random(1)
        for number in range(100):
            folder = self.folder / str(number)
            paths = self.random_paths(chance)
            wanted = chance.sample(paths, chance.randint(1, 10))
            expected = set()
            for library in "uvwxyz"[: chance.randint(1, 6)]:
                listed = chance.sample(paths, chance.randint(0, 8))
                record = self.random_record(listed, chance)
                self.install(library, record=record, folder=folder)
                if set(wanted).intersection(listed):
                    expected.add(library)
            with self.subTest(number=number):
                self.assertEqual(self.owners(*wanted, folder=folder), expected)


class TestWithoutRecord(Case):
    def install_without_record(self, name: str, top_level: str = "") -> None:
        """Install a library without a RECORD.

        top_level: the text of its top_level.txt, if it has one
        """
        more = {"top_level.txt": top_level}
        self.install(name, record=None, more=more if top_level else None)

    def assert_owned(self, module: str, *libraries: str) -> None:
        with self.subTest(module=module):
            self.assertEqual(self.owners(module), set(libraries))

    # By names

    def test_a_library_owns_its_top_level_modules(self) -> None:
        self.install_without_record("PyYAML", "_yaml\nyaml\n")
        self.assert_owned("yaml/__init__.py", "pyyaml")
        self.assert_owned("_yaml/__init__.py", "pyyaml")
        self.assert_owned("pyyaml.py")

    def test_without_top_levels_a_library_owns_the_module_of_its_name(self) -> None:
        self.install_without_record("six")
        self.install_without_record("typing-extensions")
        self.install_without_record("rich")
        self.assert_owned("six.py", "six")
        self.assert_owned("typing_extensions.py", "typing-extensions")
        self.assert_owned("rich_private.py")

    def test_without_top_levels_a_module_may_have_capital_letters(self) -> None:
        self.install_without_record("Cython")
        self.assert_owned("Cython/__init__.py", "cython")

    def test_top_levels_may_have_capital_letters(self) -> None:
        self.install_without_record("python-pillow", "PIL\n")
        self.assert_owned("PIL/__init__.py", "python-pillow")

    def test_more_of_a_library_that_was_loaded_before_does_not_count(self) -> None:
        self.install_without_record("pack")
        modules = ["a", "b", "c", "d", "e", "f", "g"]
        self.write(self.site / "pack", {"__init__.py": ""})
        for module in modules:
            self.write(self.site / "pack", {f"{module}.py": ""})
        code = f"from pack import {', '.join(modules)}"
        self.assert_used(code, before="import pack")

    def test_a_name_at_the_beginning_of_another_owns_its_module(self) -> None:
        self.install_without_record("tomli")
        self.install_without_record("tomli-w")
        self.assert_owned("tomli_w/__init__.py", "tomli-w")
        self.assert_owned("tomli/__init__.py", "tomli")

    def test_an_egg_info_that_is_a_file_owns_the_module_of_its_name(self) -> None:
        metadata = "Metadata-Version: 1.0\nName: old\n"
        self.write(self.site, {"old-1.0.egg-info": metadata})
        self.assert_owned("old/__init__.py", "old")

    def test_an_egg_info_that_is_a_folder_owns_the_module_of_its_name(self) -> None:
        self.write(self.site, {"eggy.egg-info/PKG-INFO": "Name: eggy"})
        self.assert_owned("eggy/__init__.py", "eggy")

    def install_azures(self) -> None:
        self.install_without_record("azure-storage-blob", "azure")
        self.install_without_record("azure-core", "azure")
        self.install_without_record("azure-mgmt-core", "azure")

    def test_of_libraries_with_one_top_level_the_path_tells_the_owner(self) -> None:
        self.install_azures()
        self.assert_owned("azure/storage/blob/__init__.py", "azure-storage-blob")
        self.assert_owned("azure/core/x.py", "azure-core")

    def test_of_two_names_that_the_path_holds_the_longer_tells_the_owner(self) -> None:
        self.install_azures()
        self.install_without_record("azure-core-tracing", "azure")
        self.assert_owned("azure/core/tracing/x.py", "azure-core-tracing")

    def test_of_libraries_with_one_top_level_all_own_what_no_path_tells(self) -> None:
        self.install_azures()
        libraries = ["azure-storage-blob", "azure-core", "azure-mgmt-core"]
        self.assert_owned("azure/other.py", *libraries)

    def test_a_part_of_the_path_tells_the_owner(self) -> None:
        self.install_without_record("google-auth")
        self.install_without_record("protobuf", "google\n")
        self.install_without_record("googleapis-common-protos", "google\n")
        self.assert_owned("google/auth/x.py", "google-auth")
        self.assert_owned("google/protobuf/__init__.py", "protobuf")

    def test_names_do_not_decide_of_what_a_record_lists(self) -> None:
        top = {"top_level.txt": "azure\n"}
        self.install("azure-storage-blob", "azure/storage/blob.py", more=top)
        self.install("azure-other", record=None, more=top)
        self.assert_owned("azure/storage/blob.py", "azure-storage-blob")
        self.assert_owned("azure/x.py", "azure-other")
        owners = self.owners("azure/storage/blob.py", "azure/x.py")
        self.assertEqual(owners, {"azure-storage-blob", "azure-other"})

    def test_names_do_not_decide_in_a_folder_of_a_persons_own(self) -> None:
        folder = self.folder / "project"
        self.install("mine", "mine.py", folder=folder, record=None)
        self.assertEqual(self.owners("mine.py", folder=folder), set())

    def test_names_decide_where_debian_installs_libraries(self) -> None:
        folder = self.folder / "dist-packages"
        self.install("theirs", "theirs.py", folder=folder, record=None)
        self.assertEqual(self.owners("theirs.py", folder=folder), {"theirs"})

    # By the lists of conda

    BEFORE_CONDA = """
def hook(event, arguments):
    if event == "open" and "conda-meta" in str(arguments):
        print("read", str(arguments[0]).rpartition("/")[2])
sys.addaudithook(hook)
sys.prefix = {!r}
"""

    def assert_used_in_conda(self, code: str, *libraries: str, printed: str) -> None:
        before = self.BEFORE_CONDA.format(str(self.folder))
        self.assert_used(code, *libraries, before=before, printed=printed)

    def write_conda_package(self, name: str, *paths: str) -> None:
        """Write conda's list of the files of a package."""
        files = [f"lib/site-packages/{path}" for path in paths]
        text = json.dumps({"name": name, "files": files}, indent=2)
        self.write(self.folder / "conda-meta", {f"{name}-1.json": text})

    def install_conda_packages(self) -> None:
        """Install a package with metadata, bs4like, and one without, other."""
        self.install("soup-four", "bs4like/__init__.py", record=None)
        info = "soup_four-1.0.dist-info/METADATA"
        self.write_conda_package("soup", "bs4like/__init__.py", "other.pyi", info)
        self.write(self.site, {"other.py": ""})
        self.write_conda_package("other", "other.py")
        self.write(self.folder / "conda-meta", {"history": ""})

    READ_BOTH = "read other-1.json\nread soup-1.json\n"

    def sorted_listing(self) -> str:
        """Return code that makes os.listdir() return names in order."""
        return textwrap.dedent("""
            import os
            listdir = os.listdir
            os.listdir = lambda folder: sorted(listdir(folder))
            """)

    def test_the_library_in_the_same_package_of_conda_counts(self) -> None:
        self.install_conda_packages()
        code = self.sorted_listing() + "import bs4like"
        self.assert_used_in_conda(code, "soup-four", printed=self.READ_BOTH)

    def test_a_package_of_conda_without_metadata_does_not_count(self) -> None:
        self.install_conda_packages()
        code = self.sorted_listing() + "import other"
        self.assert_used_in_conda(code, printed=self.READ_BOTH)

    def test_a_package_of_conda_with_a_longer_path_does_not_count(self) -> None:
        self.install("soup-four", record=None)
        info = "soup_four-1.0.dist-info/METADATA"
        self.write_conda_package("soup", "deep/other.py", info)
        self.write(self.site, {"other.py": ""})
        self.assert_used_in_conda("import other", printed="read soup-1.json")

    def test_no_list_of_a_package_manager_is_missed(self) -> None:
        self.install("gamma", "gamma.py", record=None)
        ended = self.run_with_popcon("import gamma", **DEBUG)
        self.assertEqual(ended.names, ["gamma"])
        self.assertRegex(ended.err, r"\Apopcon: sent .*\n\Z")

    def test_metadata_are_sought_in_lists_alone_that_have_a_new_module(self) -> None:
        self.install_conda_packages()
        code = self.sorted_listing() + """
import bs4like
import popcon
in_package = popcon.PathEntry.in_package
def told(self, lines, folder, listed):
    print(sorted(listed)[0].rpartition("/")[2])
    return in_package(self, lines, folder, listed)
popcon.PathEntry.in_package = told
"""
        printed = f"{self.READ_BOTH}__init__.py\n"
        self.assert_used_in_conda(code, "soup-four", printed=printed)

    def test_condas_lists_are_asked_before_names(self) -> None:
        self.install_conda_packages()
        self.install("bs4like", record=None)
        code = self.sorted_listing() + "import bs4like"
        self.assert_used_in_conda(code, "soup-four", printed=self.READ_BOTH)

    def test_condas_lists_are_not_read_for_what_a_record_lists(self) -> None:
        self.install_conda_packages()
        self.install("alpha", "alpha.py")
        self.assert_used_in_conda("import alpha", "alpha", printed="")

    def test_condas_lists_are_not_read_where_all_libraries_have_a_record(self) -> None:
        self.install("alpha", "alpha.py")
        self.write(self.site, {"dropped.py": ""})
        self.write_conda_package("alpha", "alpha.py")
        self.assert_used_in_conda("import dropped", printed="")


class TestArchives(Case):
    def test_what_is_imported_from_a_zip_archive_does_not_count(self) -> None:
        self.install("alpha", "alpha/__init__.py")
        archive = shutil.make_archive(str(self.folder / "libraries"), "zip", self.site)
        path = os.pathsep.join([archive, str(HERE)])
        self.assert_used("import alpha", PYTHONPATH=path)

    def test_a_library_does_not_count_for_its_namesake_in_a_zip_archive(self) -> None:
        self.install("gamma", "gamma.py")
        self.write(self.own, {"gamma.py": ""})
        archive = shutil.make_archive(str(self.folder / "app"), "zip", self.own)
        path = os.pathsep.join([archive, str(self.site), str(HERE)])
        self.assert_used("import gamma", PYTHONPATH=path)

    def test_a_library_without_record_does_not_count_for_it_either(self) -> None:
        self.install("gamma", record=None)
        self.write(self.own, {"gamma.py": ""})
        archive = shutil.make_archive(str(self.site / "app"), "zip", self.own)
        path = os.pathsep.join([archive, str(self.site), str(HERE)])
        self.assert_used("import gamma", PYTHONPATH=path)

    def test_a_library_in_a_folder_counts_beside_a_zip_archive(self) -> None:
        self.install("gamma", "gamma.py")
        self.write(self.own, {"mine.py": ""})
        archive = shutil.make_archive(str(self.folder / "app"), "zip", self.own)
        path = os.pathsep.join([archive, str(self.site), str(HERE)])
        self.assert_used("import mine, gamma", "gamma", PYTHONPATH=path)

    def write_egg(self) -> Path:
        """Write an egg of a library, and return its folder."""
        egg = self.folder / "gamma-1.0-py3.egg"
        metadata = {"PKG-INFO": "Name: Gamma.X\n", "top_level.txt": "gamma\n"}
        self.write(egg / "EGG-INFO", metadata)
        self.write(egg, {"gamma/__init__.py": ""})
        return egg

    def test_an_egg_that_is_a_folder_counts(self) -> None:
        egg = str(self.write_egg())
        self.assert_used(f"sys.path += [{egg!r}]; import gamma", "gamma-x")

    def test_an_egg_that_is_a_zip_archive_does_not_count(self) -> None:
        egg = self.write_egg()
        zipped = Path(shutil.make_archive(str(self.folder / "zipped"), "zip", egg))
        path = str(zipped.rename(self.folder / "gamma-2.0-py3.egg"))
        self.assert_used(f"sys.path += [{path!r}]; import gamma")

    # Modules that have no file, since a finder of a person's own makes them

    FINDER = """
from importlib import machinery, metadata

class Distribution(metadata.Distribution):
    def __init__(self, name, top_level):
        self.texts = {"METADATA": f"Name: {name}", "top_level.txt": top_level}

    def read_text(self, name):
        return self.texts.get(name)

    def locate_file(self, path):
        return path

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("virtual", "virtual.part", "second", "mine"):
            return machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        pass

    def find_distributions(self, context=None):
        return [Distribution("Vir.tual", "virtual second"), Distribution("other", "other")]

sys.meta_path.insert(0, Finder())
asked = metadata.packages_distributions
def packages_distributions():
    print("asked")
    return asked()
metadata.packages_distributions = packages_distributions
"""

    def test_a_library_of_a_finder_of_ones_own_counts(self) -> None:
        code = f"{self.FINDER}import virtual"
        self.assert_used(code, "vir-tual", printed="asked")

    def test_a_library_of_the_finder_counts_beside_a_module_of_none(self) -> None:
        code = f"{self.FINDER}import virtual, mine"
        self.assert_used(code, "vir-tual", printed="asked")

    def test_a_library_of_the_finder_that_was_loaded_before_does_not_count(self) -> None:
        before = f"{self.FINDER}import second"
        self.assert_used("import virtual", before=before, printed="asked")

    def test_a_module_does_not_count_that_no_library_of_the_finder_has(self) -> None:
        self.assert_used(f"{self.FINDER}import mine", printed="asked")

    def test_the_finder_is_not_asked_about_modules_with_a_file(self) -> None:
        self.install("alpha", "alpha.py")
        self.assert_used(f"{self.FINDER}import alpha", "alpha")

    def test_the_finder_is_not_asked_about_files_that_are_no_paths(self) -> None:
        code = "import virtual; virtual.__file__ = virtual.__spec__.origin = 'virtual'"
        self.assert_used(self.FINDER + code)

    def test_the_finder_is_not_asked_about_namespace_packages(self) -> None:
        (self.site / "namespace").mkdir()
        self.assert_used(f"{self.FINDER}import namespace")

    def test_the_finder_is_not_asked_about_modules_in_packages(self) -> None:
        before = f"{self.FINDER}import virtual"
        self.assert_used("import virtual.part", before=before)

    def test_nobody_is_asked_about_modules_of_a_finder_without_libraries(self) -> None:
        self.assert_used(f"{self.FINDER}del Finder.find_distributions; import virtual")

    def test_nobody_is_asked_where_importlib_metadata_is_not_loaded(self) -> None:
        forget = "del sys.modules['importlib.metadata']"
        self.assert_used(f"{self.FINDER}{forget}; import virtual")

    def test_the_finder_of_the_backport_is_not_asked(self) -> None:
        code = f"{self.FINDER}Finder.__name__ = 'MetadataPathFinder'; import virtual"
        self.assert_used(code)


# ---- libraries -> statsd lines -> datagrams -> socket -------------------------------


class Libraries(Case):
    """A test with the libraries alpha, beta and gamma, of one module each."""

    def setUp(self) -> None:
        super().setUp()
        for name in ("alpha", "beta", "gamma"):
            self.install(name, f"{name}.py")


class TestSending(Libraries):
    def test_the_very_bytes(self) -> None:
        code = "import popcon; popcon.setup_reporter(); import beta, alpha"
        with Server() as server:
            self.run_python(code, **server.settings)
            datagram = f"{PREFIX}alpha:1|c\n{PREFIX}beta:1|c".encode()
            self.assertEqual(server.received(), [datagram])

    def test_a_line_tells_the_sample_rate_if_it_is_below_1(self) -> None:
        self.assertEqual(popcon.statsd_line("x", "p"), b"p.x:1|c")
        self.assertEqual(popcon.statsd_line("x", "p", "1.0"), b"p.x:1|c")
        self.assertEqual(popcon.statsd_line("x", "p", "0.10"), b"p.x:1|c|@0.10")

    def test_a_prefix_of_ones_own_is_sent(self) -> None:
        code = "import popcon; popcon.setup_reporter(); import alpha"
        with Server() as server:
            server.settings["PYTHON_POPCONTEST_STATSD_PREFIX"] = "a.b-C_d"
            self.run_python(code, **server.settings)
            self.assertEqual(server.received(), [b"a.b-C_d.alpha:1|c"])

    # Addresses

    def test_an_address_of_ipv6_receives(self) -> None:
        code = "import popcon; popcon.setup_reporter(); import alpha"
        try:
            server = self.open(Server("::1"))
        except OSError:
            self.skipTest("this machine has no IPv6")
        self.run_python(code, **server.settings)
        self.assertEqual(server.names(), ["alpha"])

    def test_ipv4_comes_first(self) -> None:
        code = """
            import alpha, _socket
            getaddrinfo = _socket.getaddrinfo
            # This address takes what nobody reads.
            other = (_socket.AF_INET6, 0, 0, "", ("::1", 9))
            _socket.getaddrinfo = lambda *arguments: [other, *getaddrinfo(*arguments)]
            """
        self.assert_sends(code, "alpha")

    FAILING_ONCE = """
import alpha, _socket

class Socket(_socket.socket):
    failures = [TimeoutError("busy")]

    def {method}(self, *arguments):
        if self.failures:
            raise self.failures.pop()
        return super().{method}(*arguments)

getaddrinfo = _socket.getaddrinfo
_socket.getaddrinfo = lambda *arguments: getaddrinfo(*arguments) * {addresses}
_socket.socket = Socket
print(popcon.report())
print(popcon.report())
"""

    def test_the_next_address_is_tried_if_the_first_has_no_socket(self) -> None:
        code = self.FAILING_ONCE.format(method="__init__", addresses=2)
        self.assert_sends(code, "alpha", out="['alpha']\n[]\n")

    def test_the_next_address_is_tried_if_the_first_takes_nothing(self) -> None:
        code = self.FAILING_ONCE.format(method="sendto", addresses=2)
        self.assert_sends(code, "alpha", out="['alpha']\n[]\n")

    def test_the_next_report_tries_an_address_anew_that_had_no_socket(self) -> None:
        code = self.FAILING_ONCE.format(method="__init__", addresses=1)
        self.assert_sends(code, "alpha", out="[]\n['alpha']\n")

    def test_the_next_report_tries_an_address_anew_that_took_nothing(self) -> None:
        code = self.FAILING_ONCE.format(method="sendto", addresses=1)
        self.assert_sends(code, "alpha", out="[]\n['alpha']\n")

    def test_a_host_without_an_address_is_an_error(self) -> None:
        self.open(mock.patch.object(popcon, "look_up", return_value=[]))
        with self.assertRaisesRegex(OSError, "nowhere.example has no address"):
            popcon.send([b"x"], "nowhere.example", 9)

    def test_a_report_waits_a_second_at_most_to_send(self) -> None:
        code = """
            import alpha, _socket
            class Socket(_socket.socket):
                def sendto(self, *arguments):
                    print(self.gettimeout())
            _socket.socket = Socket
            """
        self.assert_sends(code, out="1.0\n")

    # Datagrams

    def check_datagrams(self, line_sizes: list[int], datagram_sizes: list[int]) -> None:
        """Check that lines of these sizes, all different, make datagrams of these."""
        lines = []
        for number, size in enumerate(line_sizes):
            lines.append(chr(ord("A") + number % 26).encode() * size)
        datagrams = popcon.datagrams(lines)
        self.assertEqual([len(datagram) for datagram in datagrams], datagram_sizes)
        self.assertEqual(b"\n".join(datagrams).split(b"\n"), lines)

    def test_a_datagram_has_at_most_1232_bytes(self) -> None:
        self.check_datagrams([9, 1222], [1232])
        self.check_datagrams([9, 1223], [9, 1223])

    def test_datagrams_are_full(self) -> None:
        self.check_datagrams([9] * 200, [1229, 769])

    def test_the_longest_line_fits_into_a_datagram(self) -> None:
        name = popcon.normalized("x" * 200)
        line = popcon.statsd_line(name, "p" * 1000, "0.12345678901234567")
        self.assertLessEqual(len(line), 1232)

    # Once for each process

    def test_a_second_report_sends_what_is_new(self) -> None:
        code = """
            import alpha
            print(popcon.report())
            print(popcon.report())
            import beta
            print(popcon.report())
            """
        self.assert_sends(code, "alpha", "beta", out="['alpha']\n[]\n['beta']\n")

    def test_what_becomes_of_the_set_of_used_libraries_does_not_matter(self) -> None:
        self.assert_sends("import alpha; popcon.used_libraries().clear()", "alpha")

    def test_a_second_setup_loses_nothing_and_doubles_nothing(self) -> None:
        code = """
            import threading
            import alpha
            popcon.report()
            popcon.setup_reporter()
            import beta
            popcon.setup_reporter()
            threading.Thread(target=popcon.setup_reporter).start()
            print(sorted(popcon.used_libraries()))
            """
        self.assert_sends(code, "alpha", "beta", out="['alpha', 'beta']\n")

    def test_start_up_files_that_are_run_again_lose_and_double_nothing(self) -> None:
        self.write(self.site, {"popcon.pth": "import popcon;popcon.setup_reporter();"})
        code = f"""
            import site
            site.addsitedir({str(self.site)!r})
            import alpha
            site.main()
            site.addsitedir({str(self.site)!r})
            import beta
            """
        self.assert_sends(code, "alpha", "beta")

    def test_a_script_that_is_run_again_loses_and_doubles_nothing(self) -> None:
        script = "import popcon\npopcon.setup_reporter()\nimport alpha, beta\n"
        self.write(self.own, {"app.py": script})
        code = """
            import runpy
            runpy.run_path("app.py")
            runpy.run_path("app.py")
            """
        self.assert_sends(code, "alpha", "beta")

    def test_without_a_setup_all_that_is_loaded_counts(self) -> None:
        code = "import alpha, popcon; print('alpha' in popcon.report())"
        ended = self.run_program(code)
        self.assertEqual(ended.out, "True\n")
        self.assertEqual(ended.names.count("alpha"), 1)

    def test_without_a_setup_nothing_is_reported_at_exit(self) -> None:
        ended = self.run_program("import popcon, alpha")
        self.assertEqual(ended, ([], "", "", 0))

    def test_a_setup_after_a_report_doubles_nothing(self) -> None:
        code = """
            import alpha, popcon
            popcon.report()
            popcon.setup_reporter()
            import beta
            """
        ended = self.run_program(code)
        self.assertEqual(ended.names.count("alpha"), 1)
        self.assertEqual(ended.names.count("beta"), 1)

    # The sample rate

    def test_processes_are_drawn_evenly(self) -> None:
        draws = sorted(popcon.Reporter().draw for _ in range(1000))
        self.assertLess(draws[400], 0.5)
        self.assertGreater(draws[600], 0.5)
        self.assertGreaterEqual(draws[0], 0)
        self.assertLess(draws[-1], 1)
        self.assertLess(draws[100], 0.25)
        self.assertGreater(draws[900], 0.75)

    def test_only_a_process_in_the_sample_reports_and_tells_the_server(self) -> None:
        code = """
            import popcon; popcon.setup_reporter()
            import alpha
            popcon._reporter.draw = 0.5
            popcon.report()
            popcon._reporter.draw = 0.49
            """
        rate = {"PYTHON_POPCONTEST_STATSD_SAMPLE_RATE": "0.5"}
        with Server() as server:
            settings = {**server.settings, **rate, **DEBUG}
            said = self.run_python(code, **settings).stderr
            line = f"{PREFIX}alpha:1|c|@0.5"
            self.assertEqual(server.received(), [line.encode()])
        refused, sent = said.splitlines()
        words = "popcon: nothing sent: this process is not in the sample of 0.5"
        self.assertEqual(refused, words)
        self.assertEqual(sent, f"popcon: sent {line} to 127.0.0.1:{server.port}")

    # Settings, and what the debug messages say of them

    def check_nothing_is_sent(self, why: str, **settings: Any) -> None:
        """Check that these settings send nothing, and what the debug message says."""
        self.assert_sends("import alpha", **settings)
        ended = self.run_with_popcon("import alpha", **DEBUG, **settings)
        self.assertEqual(ended._replace(err=""), ([], "", "", 0))
        self.assertRegex(ended.err, rf"\Apopcon: nothing sent: {why}\n\Z")

    def test_nothing_is_sent_without_a_host(self) -> None:
        why = f"{HOST} is not set"
        self.check_nothing_is_sent(why, PYTHON_POPCONTEST_STATSD_HOST="")

    def test_nothing_is_sent_to_a_host_that_does_not_exist(self) -> None:
        host = "nowhere.invalid"
        self.check_nothing_is_sent(".*", PYTHON_POPCONTEST_STATSD_HOST=host)

    def test_nothing_is_sent_with_a_wrong_setting(self) -> None:
        name = "PYTHON_POPCONTEST_STATSD_PREFIX"
        self.check_nothing_is_sent(f"{name}='a b': must be .*", **{name: "a b"})

    def test_nothing_is_sent_under_do_not_track(self) -> None:
        why = "DO_NOT_TRACK is set"
        self.check_nothing_is_sent(why, DO_NOT_TRACK="1")
        self.check_nothing_is_sent(why, DO_NOT_TRACK="")
        self.check_nothing_is_sent(why, DO_NOT_TRACK="false")

    def test_do_not_track_that_is_0_is_none(self) -> None:
        self.assert_sends("import alpha", "alpha", DO_NOT_TRACK="0")

    def test_a_debug_message_tells_what_was_sent_and_whereto(self) -> None:
        ended = self.run_with_popcon("import alpha", **DEBUG)
        self.assertEqual(ended._replace(err=""), (["alpha"], "", "", 0))
        said = rf"\Apopcon: sent {PREFIX}alpha:1\|c to 127.0.0.1:\d+\n\Z"
        self.assertRegex(ended.err, said)

    def test_a_debug_message_tells_that_nothing_was_used(self) -> None:
        why = "no library was used, or none since the last report"
        self.assert_sends("", err=f"popcon: nothing sent: {why}\n", **DEBUG)

    def test_debug_that_is_0_or_empty_is_off(self) -> None:
        self.assert_sends("", PYTHON_POPCONTEST_DEBUG="0")
        self.assert_sends("", PYTHON_POPCONTEST_DEBUG="")

    def test_a_debug_message_without_a_stderr_is_no_error(self) -> None:
        code = """
            import alpha, sys
            sys.stderr = None
            print(popcon.report())
            """
        self.assert_sends(code, "alpha", out="['alpha']\n", **DEBUG)

    def test_a_debug_message_is_one_line_of_any_characters(self) -> None:
        code = "popcon.debug('a \\n b \\udcff ü')"
        ended = self.run_with_popcon(code, PYTHONIOENCODING="utf-8", **DEBUG)
        self.assertEqual(ended.err.splitlines()[0], "popcon: a b \\udcff ü")

    def test_what_was_loaded_under_do_not_track_is_not_sent_later(self) -> None:
        code = """
            import os
            import alpha
            popcon.report()
            os.environ["DO_NOT_TRACK"] = "1"
            import beta
            assert popcon.report() == []
            del os.environ["DO_NOT_TRACK"]
            import gamma
            """
        self.assert_sends(code, "alpha", "gamma")

    def assert_right(self, name: str, *values: str) -> None:
        """Check that each of the values of a setting is in force."""
        name = f"PYTHON_POPCONTEST_STATSD_{name}"
        for value in values:
            environ = mock.patch.dict(os.environ, {name: value})
            with self.subTest(value=value), environ:
                self.assertEqual(popcon.setting(name), value)

    def assert_wrong(self, name: str, *values: str) -> None:
        """Check that each of the values of a setting is refused with what is right."""
        name = f"PYTHON_POPCONTEST_STATSD_{name}"
        for value in values:
            environ = mock.patch.dict(os.environ, {name: value})
            sentence = f"(?s)^{name}=.*: must be "
            refused = self.assertRaisesRegex(ValueError, sentence)
            with self.subTest(value=value[:9]), environ, refused:
                popcon.setting(name)

    def test_a_setting_that_is_empty_has_its_default(self) -> None:
        defaults = {
            HOST: "",
            "PYTHON_POPCONTEST_STATSD_PORT": "9125",
            "PYTHON_POPCONTEST_STATSD_PREFIX": "python_popcon.library_used",
            "PYTHON_POPCONTEST_STATSD_SAMPLE_RATE": "1",
        }
        self.assertEqual(popcon.SETTINGS.keys(), defaults.keys())
        for name, default in defaults.items():
            with mock.patch.dict(os.environ, {name: ""}):
                self.assertEqual(popcon.setting(name), default)
                del os.environ[name]
                self.assertEqual(popcon.setting(name), default)

    def test_a_host_is_a_name_or_an_address(self) -> None:
        self.assert_right("HOST", "a", "a.b.", "my_host-1", "x.com", "a" * 63)
        self.assert_right("HOST", "10.0.0.3", "::1", "fe80::1%eth0")

    def test_a_host_has_no_port_or_scheme(self) -> None:
        self.assert_wrong("HOST", "statsd:9125", "http://x", "a/b")

    def test_a_host_has_no_other_characters(self) -> None:
        self.assert_wrong("HOST", "a b", "x\ny", "ü", "a,b")

    def test_a_host_has_no_empty_or_endless_label(self) -> None:
        self.assert_wrong("HOST", "a..b", ".", ".a", "a" * 64, "x." + "a" * 64)

    def test_a_port_is_a_number_from_1_to_65535(self) -> None:
        self.assert_right("PORT", "1", "65535")
        self.assert_wrong("PORT", "0", "65536", "-1", "1.5", "x", " 1", "9" * 5000)
        self.assert_wrong("PORT", "\N{ARABIC-INDIC DIGIT ONE}")

    def test_a_prefix_has_parts_between_dots(self) -> None:
        self.assert_right("PREFIX", "a", "a.b_c-d", "x" * 1000)
        self.assert_wrong("PREFIX", "a..b", ".a", "a.", "x" * 1001)

    def test_a_prefix_has_no_other_characters(self) -> None:
        self.assert_wrong("PREFIX", "a b", "a:b", "a|c", "a\nb", "é", "a/b", "a%b")

    def test_a_sample_rate_is_a_decimal_number_above_0_and_not_above_1(self) -> None:
        self.assert_right("SAMPLE_RATE", "1", "1.0", "0.1", ".5")
        self.assert_wrong("SAMPLE_RATE", "0", "0.0", "1.1", "-1", "1e-3", "0,5", ".")
        self.assert_wrong("SAMPLE_RATE", "x", "nan", "1.2.3", "0." + "1" * 30)
        self.assert_wrong("SAMPLE_RATE", "\N{ARABIC-INDIC DIGIT ONE}")

    # Failures

    def install_sixty(self) -> list[str]:
        """Install sixty libraries, which need two datagrams, and return their names."""
        names = []
        for number in range(60):
            name = f"library-{number}"
            self.install(name, f"library_{number}.py")
            names.append(name)
        return sorted(names)

    SECOND_DATAGRAM_FAILS = """
import _socket

for number in range(60):
    __import__(f"library_{number}")

class Socket(_socket.socket):
    failure = None
    sent = 0

    def sendto(self, packet, address):
        if Socket.failure and Socket.sent:
            raise Socket.failure
        Socket.sent += 1
        return super().sendto(packet, address)

_socket.socket = Socket
"""

    def test_what_could_not_be_sent_is_sent_the_next_time_and_no_more(self) -> None:
        names = self.install_sixty()
        code = f"""
{self.SECOND_DATAGRAM_FAILS}
Socket.failure = OSError("gone")
first = popcon.report()
print(first == sorted(popcon._reporter.sent), 0 < len(first) < 60)
Socket.failure = None
"""
        self.assert_sends(code, *names, out="True True\n")

    def test_what_a_thread_did_not_send_that_died_is_sent_the_next_time(self) -> None:
        names = self.install_sixty()
        code = f"""
{self.SECOND_DATAGRAM_FAILS}
import threading
Socket.failure = SystemExit("the thread dies")
thread = threading.Thread(target=popcon.report)
thread.start()
thread.join()
Socket.failure = None
"""
        self.assert_sends(code, *names)

    def test_a_report_does_not_wait_long_for_that_of_another_thread(self) -> None:
        code = """
            import alpha
            popcon.PATIENCE = 0.01
            with popcon._reporter.lock:
                print(popcon.report())
            """
        ended = self.run_with_popcon(code, **DEBUG)
        self.assertEqual((ended.names, ended.out), (["alpha"], "[]\n"))
        said = "popcon: nothing sent: another report is being made\n"
        self.assertEqual(ended.err.splitlines(keepends=True)[0], said)

    # The name server

    def test_a_silent_name_server_delays_the_exit_by_a_second_at_most(self) -> None:
        name_server = self.open(Server())
        code = name_server.code_to_ask_it_for_names()
        code += "import alpha, _socket\n"
        code += "_socket.getaddrinfo = print  # which is never called\n"
        code += "popcon.report(); popcon.report()\n"
        host = "statsd.example"
        silent = f"popcon: nothing sent: {host}: the name server 127.0.0.1 took more than 1 s\n"
        paused = "popcon: nothing sent: the last look-up of the host was slow, and failed\n"
        # At exit it is asked anew.
        said = silent + paused + silent
        self.assert_sends(code, err=said, PYTHON_POPCONTEST_STATSD_HOST=host, **DEBUG)
        self.assertEqual(len(name_server.received()), 2)

    def test_a_silent_name_server_leaves_no_socket_open(self) -> None:
        name_server = self.open(Server())
        code = name_server.code_to_ask_it_for_names()
        code += "import alpha; popcon.PATIENCE = 0.1"
        host = "statsd.example"
        flags = ("-X", "dev")
        self.assert_sends(code, flags=flags, PYTHON_POPCONTEST_STATSD_HOST=host)

    def test_a_silent_name_server_is_asked_again_after_ten_minutes(self) -> None:
        name_server = self.open(Server())
        code = name_server.code_to_ask_it_for_names()
        code += """
import alpha, time
really = time.monotonic
popcon.report()
time.monotonic = lambda: really() + 590
popcon.report()
time.monotonic = lambda: really() + 610
popcon.report()
import os
os._exit(0)
"""
        self.run_with_popcon(code, PYTHON_POPCONTEST_STATSD_HOST="statsd.example")
        self.assertEqual(len(name_server.received()), 2)

    def test_a_clock_that_was_set_to_a_time_long_ago_does_no_harm(self) -> None:
        # As freezegun does, with a date before 1970.
        code = "import time, alpha; time.monotonic = lambda: -3e8"
        self.assert_sends(code, "alpha")
        self.assert_sends(f"import os; {code}; popcon.report(); os._exit(0)", "alpha")

    def test_a_look_up_that_takes_long_in_vain_is_not_made_again_at_once(self) -> None:
        code = """
            import alpha, _socket, time
            popcon.PATIENCE = 0.1
            def getaddrinfo(*arguments):
                time.sleep(0.1)
                raise OSError("nobody knows")
            _socket.getaddrinfo = getaddrinfo
            popcon.report()
            popcon.report()
            os._exit(0)
            """
        ended = self.run_with_popcon(f"import os\n{textwrap.dedent(code)}", **DEBUG)
        said = "popcon: nothing sent: nobody knows\npopcon: nothing sent: "
        said += "the last look-up of the host was slow, and failed\n"
        self.assertEqual(ended, ([], "", said, 0))

    def test_a_thread_that_imports_during_the_setup_does_no_harm(self) -> None:
        # Then sys.modules changes between two steps of an iteration.
        code = """
            import popcon, sys
            def changed(items):
                if items is sys.modules:
                    raise RuntimeError("dictionary changed size during iteration")
                return reversed(items)
            popcon.reversed = changed
            popcon.setup_reporter()
            del popcon.reversed
            import alpha
            """
        self.assertEqual(self.run_program(code).names, ["alpha"])

    def test_a_report_that_is_interrupted_at_exit_is_told(self) -> None:
        code = """
            import alpha
            def interrupt(*arguments):
                raise KeyboardInterrupt
            popcon.owners = interrupt
            """
        self.assert_sends(code, err="popcon: stopped\n", **DEBUG)
        self.assert_sends(code)

    def test_a_set_up_that_fails_is_told(self) -> None:
        code = """
            import popcon
            popcon.executed_files = None
            popcon.setup_reporter()
            """
        ended = self.run_program(code, **DEBUG)
        self.assertRegex(ended.err, r"\Apopcon: not set up completely: TypeError\(.*\n")

    def test_what_is_not_foreseen_is_told(self) -> None:
        code = """
            import alpha
            def fail(*arguments):
                raise RuntimeError("odd")
            popcon.owners = fail
            """
        said = "popcon: nothing sent: RuntimeError('odd')\n"
        self.assert_sends(code, err=said, **DEBUG)

    def test_a_server_that_takes_nothing_is_no_silent_name_server(self) -> None:
        code = """
            import alpha, _socket
            class Socket(_socket.socket):
                def sendto(self, *arguments):
                    raise TimeoutError("busy")
            _socket.socket = Socket
            popcon.report()
            """
        said = "popcon: nothing sent: busy\n"
        self.assert_sends(code, err=said + said, **DEBUG)

    def test_an_address_asks_no_name_server(self) -> None:
        name_server = self.open(Server())
        code = name_server.code_to_ask_it_for_names() + "import alpha"
        self.assert_sends(code, "alpha")
        self.assertEqual(name_server.received(), [])

    def test_a_name_in_etc_hosts_asks_no_name_server(self) -> None:
        name_server = self.open(Server())
        code = name_server.code_to_ask_it_for_names()
        code += """
read_nothing = popcon.read
def read(path):
    if path == "/etc/hosts":
        return b"127.0.0.1 localhost statsd"
    return read_nothing(path)
popcon.read = read
import alpha
"""
        self.assert_sends(code, "alpha", PYTHON_POPCONTEST_STATSD_HOST="localhost")
        self.assertEqual(name_server.received(), [])

    RESOLV_CONF = b"""# a comment
#nameserver 127.0.0.3
search a.b c
nameserver 127.0.0.1
nameserver 127.0.0.2
"""
    # In the order in which getaddrinfo() asks them; the first two bytes are the number.
    QUESTIONS = [
        b"\0\0\1\0\0\1\0\0\0\0\0\0\6statsd\3mon\0\0\1\0\1",
        b"\0\1\1\0\0\1\0\0\0\0\0\0\6statsd\3mon\1a\1b\0\0\1\0\1",
        b"\0\2\1\0\0\1\0\0\0\0\0\0\6statsd\3mon\1c\0\0\1\0\1",
    ]

    @staticmethod
    def answer_to(question: int, records: int, code: int = 0) -> bytes:
        """Return the begin of a name server's answer, with so many records.

        code: of an error (RFC 1035)
        """
        flags = bytes([0x81, 0x80 + code])
        return bytes([0, question]) + flags + b"\0\1\0" + bytes([records]) + bytes(4)

    def ask_name_server(
        self, *answers: bytes, patience: float, resolv_conf: bytes = RESOLV_CONF
    ) -> list[bytes]:
        """Await a name server with these answers, and return what it was asked.

        Raises what popcon raises.

        patience: seconds that popcon waits for an answer
        """
        server = self.open(Server())
        server.settimeout(30)
        # The second name server is silent.
        second = self.open(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        second.bind(("127.0.0.2", server.port))
        files = {"/etc/resolv.conf": resolv_conf}
        patch = mock.patch.multiple(
            popcon,
            NAME_SERVER_PORT=server.port,
            PATIENCE=patience,
            read=files.get,
        )
        with patch, ThreadPoolExecutor(1) as pool:
            ended = pool.submit(
                popcon.await_name_server, "statsd.mon", popcon.TYPE_A
            )
            queries = []
            for answer in answers or [b""]:
                query, client = server.recvfrom(512)
                queries.append(query)
                server.sendto(answer, client)
            ended.result()
        return queries

    def test_the_name_server_is_asked_for_all_that_the_look_up_asks(self) -> None:
        answers = [self.answer_to(question, 0) for question in range(3)]
        queries = self.ask_name_server(*answers, patience=30)
        self.assertEqual(queries, self.QUESTIONS)

    def test_an_answer_with_an_address_is_enough(self) -> None:
        self.ask_name_server(self.answer_to(0, 1), patience=30)

    def test_an_answer_to_another_question_is_none(self) -> None:
        with self.assertRaisesRegex(OSError, "took more than"):
            self.ask_name_server(self.answer_to(1, 1), patience=0.1)

    def test_answers_without_end_to_other_questions_are_silence(self) -> None:
        server = self.open(Server())
        other = self.answer_to(1, 1)

        def flood() -> None:
            _, client = server.recvfrom(512)
            for _ in range(200):
                server.sendto(other, client)
                time.sleep(0.01)

        files = {"/etc/resolv.conf": self.RESOLV_CONF}
        patch = mock.patch.multiple(
            popcon, NAME_SERVER_PORT=server.port, PATIENCE=0.3, read=files.get
        )
        with patch, ThreadPoolExecutor(1) as pool:
            flooding = pool.submit(flood)
            with self.assertRaisesRegex(OSError, "took more than"):
                popcon.await_name_server("statsd.mon", popcon.TYPE_A)
            self.assertFalse(flooding.done())

    def test_a_name_server_without_an_answer_is_silent(self) -> None:
        with self.assertRaisesRegex(OSError, "took more than"):
            self.ask_name_server(patience=0.1)

    def test_a_name_server_that_answers_one_question_of_three_is_silent(self) -> None:
        with self.assertRaisesRegex(OSError, "took more than"):
            self.ask_name_server(self.answer_to(0, 0), patience=0.1)

    def test_an_answer_that_is_cut_short_is_none(self) -> None:
        for answer in (b"\0", b"\0\0\x81", self.answer_to(0, 1)[:-1]):
            with self.assertRaisesRegex(OSError, "took more than"):
                self.ask_name_server(answer, patience=0.1)

    def test_a_name_that_does_not_exist_is_an_answer(self) -> None:
        answers = [self.answer_to(question, 0, code=3) for question in range(3)]
        self.ask_name_server(*answers, patience=30)

    def test_after_one_that_fails_the_next_one_is_awaited(self) -> None:
        for code in (2, 4, 5):  # cannot answer, does not know the question, refuses
            answer = self.answer_to(0, 0, code=code)
            with self.assertRaisesRegex(OSError, "127.0.0.2 took more"):
                self.ask_name_server(answer, patience=0.3)

    def test_after_one_that_is_not_there_the_next_one_is_awaited(self) -> None:
        lines = b"nameserver 127.0.0.3\n" + self.RESOLV_CONF
        with self.assertRaisesRegex(OSError, "127.0.0.1 took more"):
            self.ask_name_server(patience=0.3, resolv_conf=lines)

    def test_no_more_name_servers_are_awaited_than_the_system_asks(self) -> None:
        lines = [f"nameserver 127.0.0.{number}" for number in range(1, 9)]
        found = popcon.name_servers(lines)
        self.assertEqual(found, ["127.0.0.1", "127.0.0.2", "127.0.0.3"])

    def names(self, host: str, *lines: str) -> list[str]:
        return popcon.names_to_look_up(host, lines)

    def test_names_are_looked_up_in_the_order_of_the_system(self) -> None:
        search = "search ns.svc svc"
        searched = ["statsd.mon.ns.svc", "statsd.mon.svc"]
        self.assertEqual(self.names("statsd.mon"), ["statsd.mon"])
        self.assertEqual(
            self.names("statsd.mon", search), ["statsd.mon", *searched]
        )
        self.assertEqual(
            self.names("statsd.mon", search, "options edns0 ndots:5"),
            [*searched, "statsd.mon"],
        )
        self.assertEqual(
            self.names("statsd.mon", search, "options ndots:2"),
            [*searched, "statsd.mon"],
        )
        self.assertEqual(
            self.names("statsd", search), ["statsd.ns.svc", "statsd.svc", "statsd"]
        )
        self.assertEqual(self.names("statsd.mon.", search), ["statsd.mon."])

    def test_the_last_line_with_domains_is_in_force(self) -> None:
        names = self.names("statsd", "search a b", "domain c", "options ndots:x")
        self.assertEqual(names, ["statsd.c", "statsd"])
        names = self.names("statsd", "domain c", "search .")
        self.assertEqual(names, ["statsd"])

    def test_a_name_server_that_refuses_is_not_waited_for(self) -> None:
        port = free_port(socket.SOCK_DGRAM)
        files = {"/etc/resolv.conf": self.RESOLV_CONF}
        patch = mock.patch.multiple(popcon, NAME_SERVER_PORT=port, read=files.get)
        with patch:
            popcon.await_name_server("statsd.mon", popcon.TYPE_A)

    def test_a_name_server_may_have_an_address_of_ipv6(self) -> None:
        try:
            server = self.open(Server("::1"))
        except OSError:
            self.skipTest("this machine has no IPv6")
        files = {"/etc/resolv.conf": b"nameserver ::1"}
        patch = mock.patch.multiple(
            popcon,
            NAME_SERVER_PORT=server.port,
            PATIENCE=0.1,
            read=files.get,
        )
        with patch, self.assertRaisesRegex(OSError, "took more than"):
            popcon.await_name_server("statsd.mon", popcon.TYPE_AAAA)
        query = b"\0\0\1\0\0\1\0\0\0\0\0\0\6statsd\3mon\0\0\x1c\0\1"
        self.assertEqual(server.received(), [query])

    # Which addresses are looked up

    def look_up(
        self, found: dict[Any, list[str]], host: str = "statsd.mon"
    ) -> list[str]:
        """Look a host up, and return what is found, and before it what was asked.

        found: addresses by their family
        """
        asked = []

        def await_name_server(host: str, record_type: bytes) -> None:
            asked.append({popcon.TYPE_A: "A", popcon.TYPE_AAAA: "AAAA"}[record_type])

        def getaddrinfo(host: bytes, port: int, family: int, kind: int) -> list[str]:
            if family not in found:
                raise socket.gaierror("unknown")
            return found[family]

        sockets = types.SimpleNamespace(**vars(popcon.standard_socket()))
        sockets.getaddrinfo = getaddrinfo
        self.open(mock.patch.object(popcon, "standard_socket", lambda: sockets))
        patch = mock.patch.object(popcon, "await_name_server", await_name_server)
        with patch:
            addresses: list[Any] = popcon.look_up(host, 9125)
        return asked + addresses

    def test_a_name_with_an_ipv4_address_is_not_asked_for_ipv6(self) -> None:
        self.assertEqual(self.look_up({socket.AF_INET: ["four"]}), ["A", "four"])

    def test_a_name_without_an_ipv4_address_is_asked_for_ipv6(self) -> None:
        found = self.look_up({socket.AF_INET6: ["six"]})
        self.assertEqual(found, ["A", "AAAA", "six"])

    def test_an_address_is_looked_up_without_a_name_server(self) -> None:
        found = {socket.AF_UNSPEC: ["b", "a"]}
        self.assertEqual(self.look_up(found, host="10.0.0.3"), ["a", "b"])
        self.assertEqual(self.look_up(found, host="::1"), ["a", "b"])


# ---- the reporter -------------------------------------------------------------------


class TestSilence(Libraries):
    # What is imported

    def check_that_setup_imports_nothing(self, *flags: str) -> None:
        """Check that alpha counts, and that only what site has loaded is imported.

        That is so in every interpreter but those that run without site.
        """
        code = f"""
            import sys, os
            sys.path[:0] = {[str(self.site), str(HERE)]}
            before = {{"popcon", *sys.modules, *sys.builtin_module_names}}
            import popcon; popcon.setup_reporter()
            print(*set(sys.modules) - before)
            import alpha
            """
        ended = self.run_program(code, *flags)
        self.assertEqual(ended, (["alpha"], "\n", "", 0))

    def test_what_was_asked_before_the_set_up_is_no_use_after_it(self) -> None:
        code = """
            import popcon, alpha
            assert "alpha" in popcon.used_libraries()
            popcon.setup_reporter()
            import beta
            assert popcon.used_libraries() == {"beta"}
            """
        ended = self.run_program(code)
        self.assertEqual(ended, (["beta"], "", "", 0), ended.err)

    def test_an_environ_that_is_none_does_no_harm(self) -> None:
        code = """
            import alpha, os
            os.environ = None
            print(popcon.report())
            """
        ended = self.run_with_popcon(f"import popcon{textwrap.dedent(code)}")
        self.assertEqual(ended, ([], "[]\n", "", 0))

    def test_setup_imports_nothing(self) -> None:
        self.check_that_setup_imports_nothing()

    def test_setup_works_isolated(self) -> None:
        # That keeps Python from its own variables, not popcon from its settings.
        self.check_that_setup_imports_nothing("-I")
        self.check_that_setup_imports_nothing("-E")

    def test_setup_works_without_site(self) -> None:
        self.check_that_setup_imports_nothing("-S")

    def test_setup_works_where_warnings_are_errors(self) -> None:
        self.check_that_setup_imports_nothing("-W", "error")
        flags = ["-I", "-S", "-W", "error", "-X", "dev", "-bb"]
        self.check_that_setup_imports_nothing(*flags)

    # What is read and opened

    WATCH = """
import os, sys

def hook(event, arguments):
    events = ("open", "os.", "import", "socket.", "subprocess.", "exec", "compile")
    if event.startswith(events):
        shown = [part for part in arguments if type(part) in (str, bytes, int, tuple)]
        os.write(2, f"{event} {shown}\\n".encode())

sys.addaudithook(hook)
"""

    def check_what_is_opened(self, host: str, other_files: str = "") -> None:
        """Check that metadata is read, and a datagram sent, and nothing else is done.

        other_files: a pattern for paths that may be read as well
        """
        self.install("bare", "bare.py", record=None)
        self.write(self.own, {"mine.py": ""})
        code = "import alpha, mine, time, _socket, importlib.metadata\n" + self.WATCH
        ended = self.run_with_popcon(code, PYTHON_POPCONTEST_STATSD_HOST=host)
        self.assertEqual(ended.names, ["alpha"])
        names = r"(RECORD|METADATA|PKG-INFO|direct_url\.json|top_level\.txt)"
        paths = rf"{re.escape(str(self.site))}/[\w.-]+-info/{names}{other_files}"
        opens = rf"(open \['({paths})', \d+\]\n)+"
        sends = r"socket.getaddrinfo .*\nsocket.__new__ .*\nsocket.sendto .*\n"
        self.assertRegex(ended.err, rf"\A{opens}{sends}\Z")
        for flags in re.findall(r"(?m)^open .* (\d+)\]$", ended.err):
            writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
            self.assertEqual(int(flags) & writing, 0)

    def test_metadata_alone_is_read_where_the_host_is_an_address(self) -> None:
        self.check_what_is_opened("127.0.0.1")

    def test_files_about_hosts_are_read_as_well_where_the_host_is_a_name(self) -> None:
        self.check_what_is_opened("localhost", "|/etc/(hosts|resolv.conf)")

    def test_nothing_is_opened_where_only_own_modules_were_used(self) -> None:
        self.write(self.own, {"mine.py": ""})
        self.assert_sends("import mine, json, csv\n" + self.WATCH)

    def test_nothing_is_opened_for_what_was_loaded_before_the_setup(self) -> None:
        self.write(self.own, {"mine.py": ""})
        code = "import alpha, mine\nimport popcon; popcon.setup_reporter()\n"
        ended = self.run_program(code + self.WATCH)
        self.assertEqual(ended, ([], "", "", 0))

    def test_nothing_is_opened_again_for_what_was_reported(self) -> None:
        code = "import alpha; popcon.report()\n"
        self.assert_sends(code + self.WATCH, "alpha")

    # A person's own modules

    SHADOWS = """
bisect _bisect collections copyreg csv _csv email enum functools json _json operator
random re selectors socket _socket sre_compile string struct types typing zipfile
"""

    def write_shadows(self) -> None:
        """Write modules of a person's own with names of the standard library."""
        source = "import os; os.write(1, b'executed')\n"
        source += "import popcon; popcon.setup_reporter(); import alpha\n"
        for name in self.SHADOWS.split():
            self.write(self.own, {f"{name}.py": source})

    def test_own_modules_with_names_of_the_standard_library_are_not_run(self) -> None:
        self.install("quoted", record='"quoted.py",,\n')
        self.write_shadows()
        self.assert_sends("import alpha", "alpha")

    def test_a_script_with_a_name_of_the_standard_library_reports(self) -> None:
        self.write_shadows()
        ended = self.run_reporting("csv.py")
        self.assertEqual(ended, (["alpha"], "executed", "", 0))
        ended = self.run_reporting("random.py")
        self.assertEqual(ended, (["alpha"], "executed", "", 0))

    def check_that_own_module_is_not_used(self, name: str) -> None:
        """Check that one is loaded instead of the standard library's, and not used."""
        source = """
            def reader(*arguments):
                raise SystemExit("executed")
            compile = escape = reader
            """
        folder = self.folder / name
        self.write(folder, {f"{name}.py": textwrap.dedent(source)})
        self.assert_sends(f"import {name}, alpha", "alpha", cwd=folder)

    def test_own_modules_that_are_loaded_are_not_used(self) -> None:
        self.check_that_own_module_is_not_used("csv")
        self.check_that_own_module_is_not_used("_csv")
        self.check_that_own_module_is_not_used("re")
        self.check_that_own_module_is_not_used("enum")
        self.check_that_own_module_is_not_used("functools")
        self.check_that_own_module_is_not_used("copyreg")

    # What a process prints, and its exit status

    def check_undisturbed(
        self,
        code: str,
        names: tuple[str, ...] | None = ("alpha",),
        flags: tuple[str, ...] = (),
        status: int = 0,
    ) -> None:
        """Check that a process ends as it does without popcon.

        names: what it sends; None if it may or may not send alpha
        status: its exit status
        """
        code = "import alpha, os, sys\n" + textwrap.dedent(code)
        # The empty line stands where popcon is set up, so that tracebacks are the same.
        without = self.run_python("\n" + code, *flags)
        self.assertEqual(without.returncode, status)
        ended = self.run_with_popcon(code, *flags)
        self.assertEqual(ended.err, without.stderr)
        self.assertEqual(ended[1:], ("", without.stderr, status))
        if names is not None:
            self.assertEqual(ended.names, list(names))

    def test_warnings_that_are_errors_change_nothing(self) -> None:
        self.check_undisturbed("", flags=("-W", "error", "-bb", "-X", "dev"))

    def test_an_empty_path_changes_nothing(self) -> None:
        self.check_undisturbed("sys.path.clear()")

    def test_bytes_on_the_path_change_nothing(self) -> None:
        self.check_undisturbed("sys.path.append(b'/x')", flags=("-bb",))

    def test_an_optimised_python_changes_nothing(self) -> None:
        self.check_undisturbed("", flags=("-OO", "-s"))

    def test_the_exit_status_stays(self) -> None:
        self.check_undisturbed("raise SystemExit(7)", status=7)

    def test_a_traceback_stays(self) -> None:
        self.check_undisturbed("raise ValueError('mine')", status=1)

    def test_no_streams_change_nothing(self) -> None:
        self.check_undisturbed("sys.stderr = sys.stdout = None")

    def test_closed_streams_change_nothing(self) -> None:
        self.check_undisturbed("os.close(0); os.close(1); os.close(2)")

    def test_a_strange_stream_changes_nothing(self) -> None:
        self.check_undisturbed("sys.stderr = 5", status=120)

    def test_strange_hooks_for_exceptions_change_nothing(self) -> None:
        self.check_undisturbed("sys.excepthook = sys.unraisablehook = 5")

    def test_another_working_folder_changes_nothing(self) -> None:
        self.check_undisturbed("os.chdir('/')")

    def test_a_working_folder_that_is_gone_changes_nothing(self) -> None:
        code = """
            folder = f"gone{os.getpid()}"
            os.mkdir(folder)
            os.chdir(folder)
            os.rmdir(f"../{folder}")
            """
        self.check_undisturbed(code)

    def test_an_empty_sys_path_changes_nothing(self) -> None:
        self.check_undisturbed("del sys.path[:]")

    def test_an_empty_sys_modules_changes_nothing(self) -> None:
        self.check_undisturbed("sys.modules.clear()", names=())

    def test_an_empty_meta_path_changes_nothing(self) -> None:
        self.check_undisturbed("del sys.meta_path[:]", names=None)

    def test_an_empty_environment_changes_nothing(self) -> None:
        self.check_undisturbed("os.environ.clear()", names=())

    def test_too_few_descriptors_change_nothing(self) -> None:
        code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))"
        self.check_undisturbed(code, names=())

    def test_threads_that_cannot_be_started_change_nothing(self) -> None:
        self.check_undisturbed("import _thread; _thread.start_new_thread = None")

    def test_modules_that_are_gone_change_nothing(self) -> None:
        code = "sys.modules['random'] = sys.modules['re'] = None"
        self.check_undisturbed(code, names=None)

    def test_a_clock_that_is_gone_changes_nothing(self) -> None:
        self.check_undisturbed("import time; del time.monotonic", names=())

    def test_a_hook_that_forbids_sockets_changes_nothing(self) -> None:
        code = """
            def hook(event, arguments):
                if event.startswith("socket"):
                    raise ZeroDivisionError
            sys.addaudithook(hook)
            """
        self.check_undisturbed(code, names=())

    def test_ctrl_c_at_exit_changes_nothing(self) -> None:
        code = """
            import signal
            def hook(event, arguments):
                if event == "open":
                    signal.raise_signal(signal.SIGINT)
            sys.addaudithook(hook)
            """
        self.check_undisturbed(code, names=None)

    def test_a_thread_that_changes_sys_modules_changes_nothing(self) -> None:
        code = """
            import itertools, threading, types
            def change():
                for number in itertools.count():
                    sys.modules[f"m{number % 999}"] = types.ModuleType("m")
                    sys.modules.pop(f"m{(number + 500) % 999}", None)
            threading.Thread(target=change, daemon=True).start()
            """
        self.check_undisturbed(code)

    def test_a_setup_that_fails_changes_nothing(self) -> None:
        code = """
            import alpha, atexit, popcon
            del atexit.register
            popcon.setup_reporter()
            """
        self.assertEqual(self.run_program(code), ([], "", "", 0))

    def test_a_report_that_fails_changes_nothing(self) -> None:
        code = """
            import alpha
            def owners(new, earlier):
                raise ZeroDivisionError
            popcon.owners = owners
            print(popcon.report())
            """
        self.assert_sends(code, out="[]\n")

    def test_a_trace_function_sees_nothing_of_popcon_and_is_given_back(self) -> None:
        code = """
            import atexit, sys
            seen = set()
            def trace(frame, event, argument):
                seen.add(frame.f_code.co_filename.rpartition("/")[2])
                return trace
            # What is registered before popcon's functions is called after them.
            def last():
                print("popcon.py" in seen, "program.py" in seen)
                print(sys.gettrace() is trace)
            atexit.register(last)
            import popcon; popcon.setup_reporter()
            import alpha
            def function():
                pass
            sys.settrace(trace)
            function()
            """
        ended = self.run_program(code)
        self.assertEqual(ended, (["alpha"], "False True\nTrue\n", "", 0))

    def test_the_exit_takes_less_than_four_megabytes(self) -> None:
        for number in range(400):
            lines = []
            for module in range(200):
                path = f"library_{number}/module_{module}.py"
                lines.append(f"{path},sha256={'x' * 43},123\n")
            self.install(f"library-{number}", record="".join(lines))
        self.write(self.site, {"dropped.py": ""})  # so that all RECORDs are read
        code = """
            import popcon; popcon.setup_reporter()
            import alpha, dropped, tracemalloc
            tracemalloc.start()
            popcon.report()
            print(tracemalloc.get_traced_memory()[1])
            """
        ended = self.run_program(code)
        self.assertLess(int(ended.out), 4_000_000)

    def test_an_older_python_says_what_is_needed_in_one_sentence(self) -> None:
        source = SOURCE.read_text(encoding="utf-8").replace("0x030A0000", "0x7F000000")
        self.write(self.own, {"old.py": source})
        ended = self.run_reporting("old.py", arguments=["selftest"])
        self.assertEqual(ended._replace(err=""), ([], "", "", 1))
        self.assertRegex(ended.err, r"\A.*popcon needs Python 3.10.*\n\Z")


@unittest.skipUnless(hasattr(os, "fork"), "needs os.fork")


class TestForks(Libraries):
    def count(self, code: str, **options: Any) -> dict[str, int]:
        """Return how often a program, and all that it starts, sent each library."""
        ended = self.run_program(code, **options)
        # With -W error, the warning about a fork would be hidden.
        self.assertEqual((ended.status, ended.err), (0, ""), ended.out)
        counts: dict[str, int] = {}
        for name in ("alpha", "beta", "gamma"):
            if name in ended.names:
                counts[name] = ended.names.count(name)
        return counts

    def count_with_children(self, work: str) -> dict[str, int]:
        """Count what a program sends that has loaded gamma and alpha, and its children.

        work: what each of its three children does, one after another
        """
        code = """
import popcon; popcon.setup_reporter()
import gamma, alpha, os, sys
def work():
{}
for _ in range(3):
    if not os.fork():
        work()
        sys.exit(0)
    os.wait()
"""
        work = textwrap.indent(textwrap.dedent(work), "    ")
        return self.count(code.format(work))

    PARENT = {"gamma": 1, "alpha": 1}

    def test_a_child_counts_what_it_loaded_itself(self) -> None:
        counts = self.count_with_children("import beta")
        self.assertEqual(counts, {**self.PARENT, "beta": 3})

    def test_a_child_counts_what_it_loaded_if_an_earlier_module_is_gone(self) -> None:
        counts = self.count_with_children("del sys.modules['gamma']; import beta")
        self.assertEqual(counts, {**self.PARENT, "beta": 3})

    def test_a_child_counts_what_it_loaded_if_the_newest_module_is_gone(self) -> None:
        # That is alpha, the last one that the parent has imported.
        counts = self.count_with_children("del sys.modules['alpha']; import beta")
        self.assertEqual(counts, {**self.PARENT, "beta": 3})

    def test_a_child_counts_what_it_loaded_if_the_newest_modules_are_gone(self) -> None:
        work = "del sys.modules['alpha'], sys.modules['gamma']; import beta"
        counts = self.count_with_children(work)
        self.assertEqual(counts, {**self.PARENT, "beta": 3})

    def test_a_child_counts_what_it_reloads(self) -> None:
        work = """
            import beta, importlib
            importlib.reload(alpha)
            """
        counts = self.count_with_children(work)
        self.assertEqual(counts, {"gamma": 1, "alpha": 4, "beta": 3})

    def test_a_child_counts_what_it_loaded_in_an_import_that_forks(self) -> None:
        own = """
            import os
            if not os.fork():
                import beta
            else:
                os.wait()
            """
        self.write(self.own, {"app.py": textwrap.dedent(own)})
        code = """
            import popcon; popcon.setup_reporter()
            import gamma, alpha, app
            """
        self.assertEqual(self.count(code), {**self.PARENT, "beta": 1})

    def test_a_child_does_not_count_what_the_parent_loaded(self) -> None:
        counts = self.count_with_children("import alpha; popcon.setup_reporter()")
        self.assertEqual(counts, self.PARENT)

    def test_a_report_of_a_child_that_sent_nothing_loses_nothing(self) -> None:
        work = f"""
            import beta
            host = os.environ.pop("{HOST}")
            popcon._reporter.report_after_cell()
            os.environ["{HOST}"] = host
            """
        counts = self.count_with_children(work)
        self.assertEqual(counts, {**self.PARENT, "beta": 3})

    def test_a_child_of_a_process_that_has_reported_begins_anew(self) -> None:
        code = """
            import popcon; popcon.setup_reporter()
            import alpha, beta, os, sys
            popcon.report()
            del sys.modules["beta"]
            if not os.fork():
                import beta, gamma
                sys.exit(0)
            os.wait()
            """
        self.assertEqual(self.count(code), {"alpha": 1, "beta": 2, "gamma": 1})

    def test_a_child_asks_a_name_server_that_was_silent_for_its_parent(self) -> None:
        name_server = self.open(Server())
        code = name_server.code_to_ask_it_for_names()
        code += """
popcon.setup_reporter()
popcon.PATIENCE = 0.1
import alpha, os
popcon.report()
if not os.fork():
    import beta
    popcon.report()
    os._exit(0)
os.wait()
os._exit(0)
"""
        self.run_program(code, PYTHON_POPCONTEST_STATSD_HOST="statsd.example")
        self.assertEqual(len(name_server.received()), 2)

    CRY_OUT = """
def cry_out(*ignored):
    os.write(2, b"looked")
popcon.executed_files = popcon.setting = cry_out
"""

    def test_a_child_that_loaded_nothing_looks_at_nothing(self) -> None:
        counts = self.count_with_children(self.CRY_OUT)
        self.assertEqual(counts, self.PARENT)

    def test_a_child_that_loaded_nothing_looks_at_nothing_when_it_is_off(self) -> None:
        counts = self.count_with_children(f"{self.CRY_OUT}del os.environ['{HOST}']")
        self.assertEqual(counts, self.PARENT)
        opt_out = "os.environ['DO_NOT_TRACK'] = '1'"
        counts = self.count_with_children(self.CRY_OUT + opt_out)
        self.assertEqual(counts, self.PARENT)

    def test_each_child_is_drawn_for_the_sample_by_itself(self) -> None:
        code = """
            import popcon; popcon.setup_reporter()
            import os, sys
            for _ in range(3):
                print(popcon._reporter.draw, flush=True)
                if os.fork():
                    os.wait()
                    break
            """
        ended = self.run_program(code)
        self.assertEqual(len(set(ended.out.splitlines())), 3, ended.out)

    def test_a_child_of_a_process_that_is_reporting_reports(self) -> None:
        code = """
            import popcon; popcon.setup_reporter()
            import os, sys
            popcon._reporter.lock.acquire()
            if not os.fork():
                import beta
                sys.exit(0)
            os.wait()
            popcon._reporter.lock.release()
            """
        self.assertEqual(self.count(code), {"beta": 1})

    def run_with_child_that_fails(self, failure: str, **options: Any) -> Ended:
        """Run a program, and a child in which popcon fails as soon as it begins.

        failure: what stands in the place of a function that popcon calls then
        """
        code = f"""
            import popcon; popcon.setup_reporter()
            import alpha, os, signal
            popcon.modules_mark = {failure}
            if not os.fork():
                os._exit(0)
            print(os.wait()[1])
            del popcon.modules_mark
            """
        return self.run_program(code, **options)

    def test_a_child_in_which_popcon_fails_is_not_disturbed(self) -> None:
        ended = self.run_with_child_that_fails("None")
        self.assertEqual((ended.out, ended.err, ended.status), ("0\n", "", 0))
        told = self.run_with_child_that_fails("None", **DEBUG).err
        self.assertRegex(told, r"\Apopcon: not set up in a child: TypeError\(.*\n")

    def test_ctrl_c_in_a_child_that_begins_is_not_shown(self) -> None:
        interrupted = "lambda: signal.raise_signal(signal.SIGINT)"
        ended = self.run_with_child_that_fails(interrupted)
        self.assertEqual((ended.out, ended.err, ended.status), ("0\n", "", 0))

    FORK_AFTER_REPORTS = """
import popcon; popcon.setup_reporter()
import os, sys
for library, host in [("alpha", "localhost"), ("beta", "statsd.example")]:
    os.environ["PYTHON_POPCONTEST_STATSD_HOST"] = host
    __import__(library)
    popcon.report()
    if not os.fork():
        sys.exit(0)
    assert os.wait()[1] == 0
"""

    def test_a_report_starts_no_thread_of_which_a_fork_would_warn(self) -> None:
        with Server() as name_server:
            code = name_server.code_to_ask_it_for_names()
            self.count(code + self.FORK_AFTER_REPORTS)

    # Workers

    def count_with_workers(
        self,
        run: str,
        work: str = "import beta",
        method: str = "fork",
        module: str = "multiprocessing",
        **options: Any,
    ) -> dict[str, int]:
        """Count what a program sends that has loaded alpha, and its workers.

        run: how it runs them
        work: what they do
        """
        code = f"""
import popcon; popcon.setup_reporter()
import alpha
def work(number):
    {work}
if __name__ == "__main__":
    from concurrent.futures import ProcessPoolExecutor
    import {module}
    context = {module}.get_context("{method}")
{textwrap.indent(run, "    ")}
"""
        return self.count(code, **options)

    PROCESSES = """
for number in range(3):
    process = context.Process(target=work, args=[number])
    process.start()
    process.join()
"""
    POOL = """
pool = context.Pool(1)
pool.map(work, range(3))
pool.close()
pool.join()
"""
    POOL_THAT_IS_TERMINATED = """
pool = context.Pool(1)
pool.map(work, range(3))
pool.terminate()
"""
    EXECUTOR = """
with ProcessPoolExecutor(1, context) as pool:
    list(pool.map(work, range(3)))
"""
    LOKY = """
import joblib
joblib.Parallel(2)(map(joblib.delayed(work), range(4)))
joblib.externals.loky.get_reusable_executor().shutdown()
"""

    def test_processes_of_multiprocessing_report_what_they_imported(self) -> None:
        counts = self.count_with_workers(self.PROCESSES)
        self.assertEqual(counts, {"alpha": 1, "beta": 3})

    def test_a_pool_of_multiprocessing_reports_what_it_imported(self) -> None:
        counts = self.count_with_workers(self.POOL)
        self.assertEqual(counts, {"alpha": 1, "beta": 1})

    def test_a_pool_of_concurrent_futures_reports_what_it_imported(self) -> None:
        counts = self.count_with_workers(self.EXECUTOR)
        self.assertEqual(counts, {"alpha": 1, "beta": 1})

    def test_a_pool_that_is_terminated_has_reported_what_it_was_told_to(self) -> None:
        run = self.POOL_THAT_IS_TERMINATED
        counts = self.count_with_workers(run, "import beta; popcon.report()")
        self.assertEqual(counts, {"alpha": 1, "beta": 1})

    def test_what_a_worker_imports_at_its_end_counts(self) -> None:
        work = """
    from multiprocessing.util import Finalize
    Finalize(None, __import__, args=["beta"], exitpriority=0)
"""
        counts = self.count_with_workers(self.PROCESSES, work)
        self.assertEqual(counts, {"alpha": 1, "beta": 3})

    def test_a_worker_reports_once_at_its_end(self) -> None:
        code = """
            import multiprocessing.util
            import popcon; popcon.setup_reporter()
            def work():
                priorities = [key[0] for key in multiprocessing.util._finalizer_registry]
                print(priorities.count(-100))
            worker = multiprocessing.get_context("fork").Process(target=work)
            worker.start()
            worker.join()
            """
        self.assertEqual(self.run_program(code).out, "1\n")

    def test_ctrl_c_at_the_end_of_a_worker_is_not_shown(self) -> None:
        work = """
    import beta, signal, sys
    def hook(event, arguments):
        if event == "open" and "RECORD" in str(arguments):
            signal.raise_signal(signal.SIGINT)
    sys.addaudithook(hook)
"""
        counts = self.count_with_workers(self.PROCESSES, work)
        # Where a worker runs atexit functions as well, its libraries count in the end.
        self.assertEqual(counts["alpha"], 1)

    def test_a_process_of_a_process_reports(self) -> None:
        work = """
    if number < 3:
        from multiprocessing import Process
        process = Process(target=work, args=[3])
        process.start()
        process.join()
    else:
        import beta
"""
        counts = self.count_with_workers(self.PROCESSES, work)
        self.assertEqual(counts, {"alpha": 1, "beta": 3})

    def test_processes_that_are_spawned_report(self) -> None:
        # They import the program anew, its setup too: each of them loads alpha.
        counts = self.count_with_workers(self.PROCESSES, method="spawn")
        self.assertEqual(counts, {"alpha": 4, "beta": 3})

    def test_a_script_does_not_count_in_a_process_that_is_spawned(self) -> None:
        setup = "import popcon; popcon.setup_reporter()"
        self.write(self.site, {"sitecustomize.py": setup})
        source = """
def work():
    import beta
if __name__ == "__main__":
    import multiprocessing
    process = multiprocessing.get_context("spawn").Process(target=work)
    process.start()
    process.join()
"""
        self.install("tool", "tool.py", source=source)
        ended = self.run_reporting(str(self.site / "tool.py"))
        self.assertEqual(ended, (["beta"], "", "", 0))

    def test_processes_of_a_fork_server_report(self) -> None:
        counts = self.count_with_workers(self.PROCESSES, method="forkserver")
        if sys.version_info >= (3, 14):
            # The server of forks imports the program, once for all.
            self.assertEqual(counts, {"alpha": 2, "beta": 3})
        else:
            self.assertEqual(counts, {"alpha": 4, "beta": 3})

    @unittest.skipUnless(
        RELATIVES, "needs POPCON_TEST_RELATIVES, a python with multiprocess"
    )
    def test_workers_of_multiprocess_report(self) -> None:
        options = {"module": "multiprocess", "python": RELATIVES}
        counts = self.count_with_workers(self.POOL, **options)
        self.assertEqual(counts, {"alpha": 1, "beta": 1})

    def test_a_persons_own_module_called_multiprocess_is_not_run(self) -> None:
        # Python calls this function of a module for each name that it lacks.
        source = "import sys\ndef __getattr__(name): sys.exit(f'asked for {name}')\n"
        package = {"multiprocess/__init__.py": "", "multiprocess/util.py": source}
        self.write(self.own, package)
        counts = self.count("""
            import multiprocess.util
            import popcon; popcon.setup_reporter()
            import alpha, os
            if os.fork():
                os.wait()
            else:
                import beta
            """)
        self.assertEqual(counts, {"alpha": 1, "beta": 1})

    @unittest.skipUnless(
        RELATIVES, "needs POPCON_TEST_RELATIVES, a python with billiard"
    )
    def test_workers_of_billiard_do_not_report(self) -> None:
        options = {"module": "billiard", "python": RELATIVES}
        counts = self.count_with_workers(self.POOL, **options)
        self.assertEqual(counts, {"alpha": 1})

    @unittest.skipUnless(RELATIVES, "needs POPCON_TEST_RELATIVES, a python with joblib")
    def test_workers_of_loky_report_if_they_set_popcon_up(self) -> None:
        counts = self.count_with_workers(self.LOKY, python=RELATIVES)
        self.assertEqual(counts, {"alpha": 1})
        work = "popcon.setup_reporter(); import beta"
        counts = self.count_with_workers(self.LOKY, work, python=RELATIVES)
        self.assertIn(counts["beta"], (1, 2))

    @unittest.skipUnless(
        RELATIVES, "needs POPCON_TEST_RELATIVES, a python with gunicorn"
    )
    def test_workers_of_gunicorn_count_what_they_load_themselves(self) -> None:
        code = """
            import popcon; popcon.setup_reporter()
            import alpha, gunicorn.app.wsgiapp, os
            def app(environ, start_response):
                import beta
                start_response("200 OK", [])
                return [b"%d" % os.getppid()]
            if __name__ == "__main__":
                gunicorn.app.wsgiapp.run()
            """
        url = f"127.0.0.1:{free_port()}"
        line = f"--preload --workers=2 --bind={url} --log-file=log program:app"
        options = {"python": RELATIVES, "arguments": line.split()}
        with ThreadPoolExecutor(1) as pool:
            counting = pool.submit(self.count, code, **options)
            while not counting.done():
                with contextlib.suppress(OSError):
                    with urllib.request.urlopen(f"http://{url}") as page:
                        server = int(page.read())
                    os.kill(server, signal.SIGTERM)
                    break
                time.sleep(0.1)
        # Only one of the workers had a request.
        self.assertEqual(counting.result(), {"alpha": 1, "beta": 1})


class TestSessions(Libraries):
    """Sessions of an IPython that is made up, and does what popcon relies on."""

    SHELL = """
class Events:
    def __init__(self):
        self.callbacks = {"post_execute": []}

    def register(self, event, function):
        self.callbacks[event].append(function)

class InteractiveShell:
    _instance = None

    def __init__(self):
        self.events = Events()

    @classmethod
    def initialized(cls):
        return cls._instance is not None

    @classmethod
    def instance(cls):
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def run_cell(self, cell):
        exec(cell, {"__name__": "__main__"})
        for function in self.events.callbacks["post_execute"]:
            function()
"""
    BEGIN = """
import IPython.terminal.ipapp
"""
    END = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell._instance = InteractiveShell()
import IPython.core.completerlib
"""
    START = BEGIN + END
    SET_UP = "import popcon; popcon.setup_reporter()\n"
    REQUIRES = """Name: ipython
Requires-Dist: need-one
Requires-Dist: need-two[fast]>=5,<6 ; python_version > "3"
Requires-Dist: optional; extra == "doc"
"""

    def setUp(self) -> None:
        super().setUp()
        files = [
            "IPython/__init__.py",
            "IPython/core/__init__.py",
            "IPython/core/completerlib.py",
            "IPython/core/interactiveshell.py",
            "IPython/terminal/__init__.py",
            "IPython/terminal/ipapp.py",
        ]
        self.install("ipython", *files, more={"METADATA": self.REQUIRES})
        self.write(self.site, {"IPython/core/interactiveshell.py": self.SHELL})

    def install_requiring(self, name: str, *requirements: str) -> None:
        """Install a library with a module of its name that requires others."""
        metadata = f"Name: {name}\n"
        for requirement in requirements:
            metadata += f"Requires-Dist: {requirement}\n"
        module = name.replace("-", "_") + ".py"
        self.install(name, module, more={"METADATA": metadata})

    def test_a_question_in_a_cell_leaves_its_report_to_be_made(self) -> None:
        cell = "shell.run_cell('import alpha, popcon; popcon.used_libraries()')"
        kill = "import os; os._exit(0)"
        names = self.run_program(self.session(cell, kill))[0]
        self.assertEqual(names, ["alpha"])

    def test_what_a_cell_could_not_send_the_next_one_sends(self) -> None:
        code = self.session(
            "send = popcon.send",
            "popcon.send = None",
            "shell.run_cell('import alpha')",
            "popcon.send = send",
            "shell.run_cell('1 + 1')",
            "import os; os._exit(0)",
        )
        names = self.run_program(code)[0]
        self.assertEqual(names, ["alpha"])

    def test_a_question_in_a_cell_that_opted_out_sends_nothing_later(self) -> None:
        opt_out = "import os; os.environ['DO_NOT_TRACK'] = '1'"
        cell = "shell.run_cell('import alpha, popcon; popcon.used_libraries()')"
        opt_in = "os.environ['DO_NOT_TRACK'] = '0'"
        code = self.session(opt_out, cell, opt_in, "import beta")
        self.assertEqual(self.run_program(code)[0], ["beta"])

    def session(self, *lines: str) -> str:
        """Return code that starts a session, sets popcon up, and goes on like this."""
        return self.START + self.SET_UP + "\n".join(lines)

    def check_session(self, *lines: str, sends: list[str], out: str = "") -> None:
        """Check what a session sends that goes on like this, and what it prints."""
        ended = self.run_session(self.session(*lines))
        self.assertEqual(ended, (sends, out, "", 0))

    def run_session(self, code: str) -> Ended:
        """Run a session where no real IPython is installed."""
        return self.run_program(code, "-S")

    # What counts

    def test_a_session_without_imports_sends_nothing(self) -> None:
        self.check_session("shell.run_cell('1 + 1')", sends=[])

    def test_what_a_cell_imports_is_sent_after_the_cell(self) -> None:
        lines = ["shell.run_cell('import alpha')", "import os; os._exit(0)"]
        self.check_session(*lines, sends=["alpha"])

    def test_what_cells_import_is_sent_once(self) -> None:
        first = "shell.run_cell('import alpha')"
        second = "shell.run_cell('import alpha, beta')"
        self.check_session(first, second, sends=["alpha", "beta"])

    def test_what_ipython_requires_does_not_count(self) -> None:
        self.install_requiring("need-one")
        self.install_requiring("need-two")
        cell = "shell.run_cell('import alpha, need_one, need_two')"
        self.check_session(cell, sends=["alpha"])

    def test_what_ipykernel_requires_does_not_count(self) -> None:
        self.install_requiring("ipykernel", "need-three (>=1)")
        self.install_requiring("need-three")
        cell = "shell.run_cell('import need_three, ipykernel')"
        self.check_session(cell, sends=[])

    def test_what_ipython_requires_for_an_extra_counts(self) -> None:
        self.install_requiring("optional")
        self.check_session("shell.run_cell('import optional')", sends=["optional"])

    def test_what_the_requirements_of_ipython_require_does_not_count(self) -> None:
        self.install_requiring("need-one", "deeper")
        self.install_requiring("deeper", "deepest", "ipython")
        self.install_requiring("deepest")
        cell = "shell.run_cell('import deepest')"
        self.check_session(cell, sends=[])

    def test_what_ipython_requires_counts_where_no_session_runs(self) -> None:
        self.install_requiring("need-one")
        code = """
            from IPython.core.interactiveshell import InteractiveShell
            import popcon; popcon.setup_reporter()
            import need_one
            """
        self.assertEqual(self.run_session(code), (["need-one"], "", "", 0))

    def test_what_ipython_requires_does_not_count_where_it_lies_elsewhere(self) -> None:
        other = self.folder / "other" / "site-packages"
        self.install("need-one", "need_one.py", folder=other)
        lines = [f"import sys; sys.path += [{str(other)!r}]", "import need_one"]
        self.check_session(*lines, sends=[])

    # What a session loads at its start because a person wants it

    # An extension that loads more when it is switched on, some of it IPython's
    EXTENSION = """
def load_ipython_extension(shell):
    import chosen.magic, IPython.core.magic
"""
    LOAD_EXTENSION = "import chosen; chosen.load_ipython_extension(shell)\n"

    def install_extension(self) -> None:
        self.install("chosen", "chosen/__init__.py", "chosen/magic.py")
        self.write(self.site / "chosen", {"__init__.py": self.EXTENSION})
        self.write(self.site / "IPython" / "core", {"magic.py": ""})

    def test_an_extension_that_is_loaded_at_the_start_counts(self) -> None:
        self.install_extension()
        ended = self.run_session(self.START + self.LOAD_EXTENSION + self.SET_UP)
        self.assertEqual(ended, (["chosen"], "", "", 0))

    def test_what_start_up_files_load_before_the_setup_counts(self) -> None:
        ended = self.run_session(self.START + "import alpha\n" + self.SET_UP)
        self.assertEqual(ended, (["alpha"], "", "", 0))

    def test_odd_names_of_modules_do_no_harm_to_a_session(self) -> None:
        code = "import sys; sys.modules[7] = sys\n"
        code += self.START + "import alpha\n" + self.SET_UP
        ended = self.run_session(code)
        self.assertEqual(ended, (["alpha"], "", "", 0))

    def test_what_start_up_files_load_is_sent_after_the_first_cell(self) -> None:
        code = self.START + "import alpha\n" + self.SET_UP
        code += "shell.run_cell('1 + 1'); import os; os._exit(0)"
        ended = self.run_session(code)
        self.assertEqual(ended, (["alpha"], "", "", 0))

    def test_what_ipython_can_do_without_does_not_count(self) -> None:
        # It does not require beta, but imports it if it is there.
        self.write(self.site / "IPython", {"__init__.py": "import IPython.core, beta"})
        ended = self.run_session(self.START + "import alpha\n" + self.SET_UP)
        self.assertEqual(ended, (["alpha"], "", "", 0))

    def test_what_a_shell_loads_when_it_is_made_does_not_count(self) -> None:
        self.write(self.site / "IPython" / "core", {"completerlib.py": "import beta"})
        ended = self.run_session(self.START + "import alpha\n" + self.SET_UP)
        self.assertEqual(ended, (["alpha"], "", "", 0))

    def test_a_shell_without_completion_has_a_baseline(self) -> None:
        completion = "import IPython.core.completerlib"
        code = self.START.replace(completion, "import beta") + self.SET_UP
        code = "import alpha\n" + code
        ended = self.run_session(code)
        self.assertEqual(ended, (["beta"], "", "", 0))

    def install_matplotlib(self) -> None:
        files = ["__init__.py", "_api.py", "pyplot.py"]
        self.install("matplotlib", *[f"matplotlib/{file}" for file in files])
        code = "import matplotlib._api, alpha"
        self.write(self.site / "matplotlib", {"__init__.py": code})

    def test_matplotlib_in_the_settings_counts(self) -> None:
        # IPython loads it before the shell, to check its settings, and then pyplot.
        self.install_matplotlib()
        code = f"{self.BEGIN}import beta, matplotlib\n{self.END}"
        code += "import matplotlib.pyplot\n"
        ended = self.run_session(code + self.SET_UP)
        self.assertEqual(ended, (["alpha", "matplotlib"], "", "", 0))

    def test_matplotlib_in_the_settings_of_a_later_session_counts(self) -> None:
        self.install_matplotlib()
        code = f"{self.SET_UP}{self.BEGIN}import beta, matplotlib\n{self.END}"
        ended = self.run_session(code + self.SET_UP)
        self.assertEqual(ended, (["alpha", "matplotlib"], "", "", 0))

    def test_what_a_session_loads_after_matplotlib_does_not_count(self) -> None:
        # A kernel's debugger looks whether django is there.
        self.install_matplotlib()
        code = f"{self.BEGIN}import matplotlib.pyplot, beta\n{self.END}"
        ended = self.run_session(code + self.SET_UP)
        self.assertEqual(ended, (["alpha", "matplotlib"], "", "", 0))

    def test_matplotlib_that_is_loaded_before_ipython_does_not_count(self) -> None:
        self.install_matplotlib()
        ended = self.run_session(f"import matplotlib\n{self.START}{self.SET_UP}")
        self.assertEqual(ended, ([], "", "", 0))

    def names_with_application(self, *, initialized: bool, interact: bool) -> list[str]:
        """Return what is sent where an application makes a shell after the setup.

        initialized: IPython knows it as the one of this process
        interact: it asks a person for commands
        """
        application = f"""
class TerminalIPythonApp:
    initialized = classmethod(lambda cls: {initialized})
    interact = {interact}
"""
        self.write(self.site / "IPython" / "terminal", {"ipapp.py": application})
        code = f"{self.SET_UP}import IPython.terminal.ipapp as ipapp\nimport alpha\n"
        code += f"{self.END}shell.parent = ipapp.TerminalIPythonApp()\n{self.SET_UP}"
        return self.run_session(code).names

    def test_a_shell_for_a_debugger_is_no_session(self) -> None:
        # ipdb makes one like this. All of it counts, and no library is lost.
        names = self.names_with_application(initialized=False, interact=False)
        self.assertEqual(names, ["alpha", "ipython"])

    def test_an_application_that_somebody_else_makes_for_a_person_is_a_session(self) -> None:
        # isympy does so.
        names = self.names_with_application(initialized=False, interact=True)
        self.assertEqual(names, [])

    def test_an_application_that_runs_one_command_is_a_session(self) -> None:
        # ipython -c
        names = self.names_with_application(initialized=True, interact=False)
        self.assertEqual(names, [])

    def test_a_shell_that_a_library_makes_is_no_session(self) -> None:
        # IPython's debugger does so, and ipywidgets.
        self.install_requiring("need-one")
        code = f"{self.SET_UP}import need_one\n{self.START}"
        ended = self.run_session(code)
        self.assertEqual(ended, (["ipython", "need-one"], "", "", 0))

    def test_matplotlib_that_cannot_be_loaded_does_no_harm(self) -> None:
        self.install_matplotlib()
        broken = "import matplotlib._api, nowhere"
        self.write(self.site / "matplotlib", {"__init__.py": broken})
        attempt = "try: import matplotlib\nexcept ImportError: pass\n"
        code = f"{self.BEGIN}{attempt}import beta\n{self.END}{self.SET_UP}"
        self.assertEqual(self.run_session(code), ([], "", "", 0))

    def test_a_part_of_matplotlib_that_is_loaded_later_does_no_harm(self) -> None:
        self.install_matplotlib()
        code = f"import matplotlib\n{self.BEGIN}import matplotlib.pyplot, beta\n"
        ended = self.run_session(code + self.END + self.SET_UP)
        self.assertEqual(ended, ([], "", "", 0))

    def test_matplotlib_that_is_loaded_before_the_setup_does_not_count(self) -> None:
        self.install_matplotlib()
        ended = self.run_session(f"import matplotlib\n{self.SET_UP}")
        self.assertEqual(ended, ([], "", "", 0))

    # Sessions that come after the setup

    def test_what_a_session_loads_at_its_start_does_not_count(self) -> None:
        code = "import gamma\n"
        code += self.SET_UP
        code += f"import alpha\n{self.BEGIN}import beta\n{self.END}"
        code += "popcon.setup_reporter()"
        ended = self.run_session(code)
        self.assertEqual(ended, (["alpha"], "", "", 0))

    def test_what_ipython_can_do_without_does_not_count_later_either(self) -> None:
        self.write(self.site / "IPython", {"__init__.py": "import IPython.core, beta"})
        code = self.SET_UP
        code += f"import IPython, alpha\n{self.START}popcon.setup_reporter()"
        ended = self.run_session(code)
        self.assertEqual(ended, (["alpha"], "", "", 0))

    def test_an_extension_counts_in_a_session_that_comes_later(self) -> None:
        self.install_extension()
        code = self.SET_UP
        code += self.START + self.LOAD_EXTENSION
        code += "popcon.setup_reporter()"
        ended = self.run_session(code)
        self.assertEqual(ended, (["chosen"], "", "", 0))

    def test_a_later_setup_in_the_same_session_loses_nothing(self) -> None:
        setup = "popcon.setup_reporter()"
        show = "print(len(shell.events.callbacks['post_execute']))"
        lines = ["import alpha", setup, setup, show]
        self.check_session(*lines, sends=["alpha"], out="1\n")

    def test_a_session_in_a_forked_child_reports_after_its_cells(self) -> None:
        code = f"""
import popcon; popcon.setup_reporter()
import alpha, os
if os.fork():
    os.wait()
else:
{textwrap.indent(self.START, "    ")}
    popcon.setup_reporter()
    shell.run_cell("import beta")
    os._exit(0)
"""
        ended = self.run_session(code)
        self.assertEqual(ended, (["alpha", "beta"], "", "", 0))

    def test_a_forked_child_does_not_read_again_what_ipython_requires(self) -> None:
        child = """
import os
if os.fork():
    os.wait()
else:
    import beta
    popcon.required_by_shell = print
    popcon.report()
    os._exit(0)
"""
        cell = "shell.run_cell('import alpha')"
        self.check_session(cell, child, sends=["alpha", "beta"])

    # After each cell

    def test_a_cell_that_loads_nothing_looks_at_nothing(self) -> None:
        lines = [
            "import socket  # as a kernel has; otherwise the report loads a part of it",
            "shell.run_cell('import alpha')",  # a report follows the first in any case
            "popcon._reporter.report = lambda: print('looked', flush=True)",
            "shell.run_cell('1 + 1')",
            "import os; os._exit(0)",
        ]
        self.check_session(*lines, sends=["alpha"])

    def test_ctrl_c_during_a_report_is_not_shown(self) -> None:
        lines = [
            "def report():",
            "    raise KeyboardInterrupt",
            "popcon._reporter.report = report",
            "shell.run_cell('import alpha')",
            "print('goes on')",
        ]
        self.check_session(*lines, sends=[], out="goes on\n")


# ---- what those who approve popcon are promised -------------------------------------

# Prints what Python tells audit hooks (PEP 578) of reads, writes, look-ups, imports.
WATCH = """
import os, sys
WATCHED = "open", "os.", "import", "socket.", "subprocess.", "exec", "compile", "glob."
def watch(event, arguments):
    if event.startswith(WATCHED):
        shown = [one for one in arguments if type(one) in (str, bytes, int, tuple)]
        os.write(2, f"{event} {shown}\\n".encode())
"""
# The library that each Python but Debian's brings along.
REAL = "pip" if importlib.util.find_spec("pip") else "gamma"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
METADATA = ("RECORD", "METADATA", "PKG-INFO", "direct_url.json", "top_level.txt")


class TestWhatIsTouched(Libraries):
    """What a report opens, lists, looks up and sends, as audit hooks see it."""

    def watched(self, code: str, **settings: Any) -> list[tuple[str, str]]:
        """Run code with real libraries; return the events of its report at exit.

        The standard library has no bytecode, as in official Python images.
        """
        bytecode = self.folder / "bytecode"
        program = f"import popcon; popcon.setup_reporter()\n{WATCH}{code}\n"
        program += "sys.addaudithook(watch)"
        settings["PYTHONPYCACHEPREFIX"] = str(bytecode)
        settings["PYTHONDONTWRITEBYTECODE"] = ""
        with Server() as server:
            ended = self.run_python(program, **server.settings | settings)
            self.names = server.names()
        self.assertEqual(ended.returncode, 0, ended.stderr)
        return re.findall(r"(?m)^(\S+) \[(.*)\]$", ended.stderr)

    def assert_only_metadata_is_read(self, events: list[tuple[str, str]]) -> None:
        sockets = {"socket.getaddrinfo", "socket.__new__", "socket.sendto"}
        kinds = {event for event, _ in events}
        self.assertLessEqual(kinds, {"open", "import"} | sockets)
        for event, arguments in events:
            if event == "import":
                self.assertIn("_socket", arguments)
            if event == "open":
                path, _, flags = arguments.rpartition(", ")
                name = os.path.basename(path.strip("'"))
                self.assertIn(name, (*METADATA, "hosts", "resolv.conf"), path)
                self.assertEqual(int(flags) & WRITING, 0, path)

    def test_a_process_with_a_real_library_reads_metadata_and_writes_nothing(self) -> None:
        events = self.watched(f"import {REAL}, alpha")
        self.assert_only_metadata_is_read(events)
        self.assertEqual(self.names, ["alpha", REAL])

    @unittest.skipUnless(LARGE, "needs POPCON_TEST_LARGE, a python with many libraries")
    def test_a_process_with_many_real_libraries_reads_metadata_and_writes_nothing(self) -> None:
        code = "import pandas, yaml, PIL.Image, bs4, requests, google.cloud.storage"
        events = self.watched(code, python=LARGE)
        self.assert_only_metadata_is_read(events)
        self.assertLessEqual({"pandas", "pyyaml", "pillow", "requests"}, set(self.names))

    def test_nothing_is_listed_whatever_is_on_sys_path(self) -> None:
        (self.own / "empty").mkdir()
        self.write(self.own / "lib", {"mine.py": ""})
        self.write(self.folder / "above", {"higher.py": ""})
        self.write(self.own, {"left.py": ""})
        code = """
            sys.path[:0] = ["lib", "empty", "../above", "..", "", os.getcwd() + "/lib/"]
            import mine, higher, left, alpha
            """
        events = self.watched(f"{textwrap.dedent(code)}import {REAL}")
        self.assert_only_metadata_is_read(events)
        self.assertEqual(self.names, ["alpha", REAL])

    def test_a_process_without_a_new_library_touches_nothing(self) -> None:
        self.write(self.own, {"mine.py": ""})
        events = self.watched("sys.path[:0] = ['']; import mine, json, csv, xml.dom")
        self.assertEqual((events, self.names), ([], []))

    def test_a_name_as_host_costs_two_more_files_and_an_address_none(self) -> None:
        events = self.watched("import alpha", PYTHON_POPCONTEST_STATSD_HOST="localhost")
        self.assert_only_metadata_is_read(events)
        self.assertIn("hosts", str(events))
        self.assertNotIn("hosts", str(self.watched("import alpha")))

    def test_a_report_writes_no_bytecode(self) -> None:
        bytecode = self.folder / "bytecode"
        code = """
            import popcon; popcon.setup_reporter()
            import alpha, sys, os
            sys.pycache_prefix = os.environ["LATER"]
            """
        settings = {"PYTHONDONTWRITEBYTECODE": "", "LATER": str(bytecode)}
        self.assertEqual(self.run_with_popcon(code, **settings)[0], ["alpha"])
        self.assertFalse(bytecode.exists())

    def test_of_an_endless_record_64_megabytes_are_read(self) -> None:
        self.write(self.site, {"endless.py": ""})
        info = self.install("endless", record="endless.py,,\n")
        with open(info / "RECORD", "r+b") as record:
            record.truncate(1 << 30)  # which takes no room on the disk
        self.assertEqual(len(popcon.read(str(info / "RECORD"))), 64 << 20)
        self.assertEqual(self.run_with_popcon("import alpha, endless")[0], ["alpha", "endless"])


class TestFewFiles(Libraries):
    """A report reads the RECORDs to which names lead, and all others only if it must."""

    def setUp(self) -> None:
        super().setUp()
        for number in range(50):
            self.install(f"other-{number}", f"package_{number}/__init__.py")

    def records(self, *modules: str) -> set[str]:
        """The libraries whose RECORDs are read for modules, by their paths."""
        opened: list[str] = []

        def read(path: str) -> bytes:
            opened.append(path)
            return Path(path).read_bytes() if os.path.isfile(path) else b""

        with mock.patch.object(popcon, "read", read):
            self.owners(*modules)
        infos = [path.split("/")[-2] for path in opened if path.endswith("RECORD")]
        return {info.partition("-1.0")[0] for info in infos}

    def test_a_namesake_is_read_alone(self) -> None:
        self.assertEqual(self.records("alpha.py"), {"alpha"})

    def test_case_and_separators_do_not_matter(self) -> None:
        self.install("Ruamel.YAML-Lib", "ruamelyaml_lib.py")
        self.assertEqual(self.records("ruamelyaml_lib.py"), {"Ruamel_YAML_Lib"})

    def test_a_part_of_the_name_leads_to_the_library(self) -> None:
        self.install("python-dateutil", "dateutil/__init__.py")
        self.assertEqual(self.records("dateutil/__init__.py"), {"python_dateutil"})

    def test_letters_in_order_lead_to_the_library(self) -> None:
        self.install("scikit-learn", "sklearn/__init__.py")
        self.assertEqual(self.records("sklearn/__init__.py"), {"scikit_learn"})

    def test_letters_of_the_first_word_lead_to_the_library(self) -> None:
        self.install("matplotlib", "mpl_toolkits/mplot3d/__init__.py")
        read = self.records("mpl_toolkits/mplot3d/__init__.py")
        self.assertEqual(read, {"matplotlib"})

    def test_underscores_before_the_first_word_do_not_matter(self) -> None:
        self.install("python-dateutil", "_dateutil_speedups.py")
        self.assertEqual(self.records("_dateutil_speedups.py"), {"python_dateutil"})

    def test_each_name_in_a_folder_is_looked_at_once(self) -> None:
        folder = self.folder  # a person's own, which may hold thousands
        looked_at: list[str] = []

        class Name(str):
            def endswith(self, *arguments: object) -> bool:
                looked_at.append(self)
                return False

        with self.as_listed(folder, [Name("own.py"), Name("data.csv")]):
            self.assertEqual(popcon.path_entries([f"{folder}/own.py"]), [])
        self.assertEqual(sorted(looked_at), ["data.csv", "own.py"])

    def install_azures(self) -> None:
        """Install many libraries whose names begin alike."""
        for part in ("core", "storage/blob", "storage/queue", "identity", "ai/ml"):
            name = f"azure-{part.replace('/', '-')}"
            self.install(name, f"azure/{part}/__init__.py", f"azure/{part}/x/y.py")

    def test_of_libraries_in_a_namespace_that_of_the_path_is_read_alone(self) -> None:
        self.install_azures()
        read = self.records("azure/core/__init__.py")
        self.assertEqual(read, {"azure_core"})
        read = self.records("azure/storage/blob/x/y.py")
        self.assertEqual(read, {"azure_storage_blob"})

    def test_a_part_of_the_path_leads_to_a_library_in_a_namespace(self) -> None:
        self.install_azures()
        self.install("blobs", "azure/blobs/__init__.py", "azure/x/blobs/__init__.py")
        self.assertEqual(self.records("azure/blobs/__init__.py"), {"blobs"})
        self.assertEqual(self.records("azure/x/blobs/__init__.py"), {"blobs"})

    def test_case_and_separators_do_not_matter_in_a_namespace(self) -> None:
        self.install_azures()
        self.install("azure-key_vault", "azure/keyVault/__init__.py")
        read = self.records("azure/keyVault/__init__.py")
        self.assertEqual(read, {"azure_key_vault"})

    def test_a_name_within_that_of_a_module_leads_to_the_library(self) -> None:
        self.install("sympy", "isympy.py")
        self.assertEqual(self.records("isympy.py"), {"sympy"})

    def test_the_path_leads_to_the_library(self) -> None:
        self.install("protobuf", "google/protobuf/message.py")
        self.assertEqual(self.records("google/protobuf/message.py"), {"protobuf"})

    def test_where_no_name_leads_on_all_are_read(self) -> None:
        self.install("opencv-python", "cv2/__init__.py")
        read = self.records("cv2/__init__.py", "alpha.py")
        self.assertEqual(len(read), 54)

    def test_both_are_counted_if_neither_or_both_have_the_name_of_a_file(self) -> None:
        self.install("opencv-python", "cv2/__init__.py")
        self.install("opencv-headless", "cv2/__init__.py")
        owners = self.owners("cv2/__init__.py")
        self.assertEqual(owners, {"opencv-python", "opencv-headless"})
        self.install("python-twin", "twin.py")
        self.install("twin-python", "twin.py")
        self.assertEqual(self.owners("twin.py"), {"python-twin", "twin-python"})

    def test_what_is_known_of_a_file_is_not_looked_up_again(self) -> None:
        code = """
            import popcon; popcon.setup_reporter()
            import alpha, package_1
            popcon.report()
            read, opened = popcon.read, []
            popcon.read = lambda path: opened.append(path) or read(path)
            import beta
            popcon.report()
            print(sorted(path.split("/")[-2] for path in opened if "RECORD" in path))
            """
        self.assertEqual(self.run_program(code)[1], "['beta-1.0.dist-info']\n")

    def test_a_library_that_is_installed_in_mid_process_counts(self) -> None:
        late = self.folder / "late"
        self.install("late", "late.py", folder=late)
        code = f"""
            import popcon; popcon.setup_reporter()
            import alpha, shutil, time
            popcon.report()
            time.sleep(0.05)  # folders' times of change are no finer on some systems
            shutil.copytree({str(late)!r}, {str(self.site)!r}, dirs_exist_ok=True)
            import importlib; importlib.invalidate_caches()
            import late
            """
        self.assertEqual(self.run_program(code)[0], ["alpha", "late"])

    @unittest.skipUnless(LARGE, "needs POPCON_TEST_LARGE, a python with several hundred")
    def test_in_a_large_environment_few_files_are_opened(self) -> None:
        code = """
            import popcon, sys; popcon.setup_reporter()
            import pandas, yaml, PIL, bs4, requests, google.cloud.storage, ruamel.yaml
            opened = []
            def hook(event, arguments):
                if event == "open":
                    opened.append(arguments[0])
            sys.addaudithook(hook)
            first = popcon.report()
            number = len(opened)
            import wcwidth
            before = len(opened)
            popcon.report()
            print(len(first), number, len(opened) - before)
            """
        ended = self.run_program(code, python=LARGE)
        used, opened, opened_next = map(int, ended[1].split())
        self.assertGreater(used, 15)
        self.assertLessEqual(opened, 4 * used + 25)
        self.assertLessEqual(opened_next, 10)


class TestUnseen(Libraries):
    """Nobody is to notice the report at exit."""

    def test_without_a_trace_function_none_is_set(self) -> None:
        code = """
            import sys
            def forbid(event, arguments):
                if event == "sys.settrace":
                    raise RuntimeError(event)
            sys.addaudithook(forbid)
            import alpha
            """
        self.assert_sends(code, "alpha")

    def test_the_class_of_a_module_may_have_another_namespace(self) -> None:
        code = """
            import alpha, sys
            class Odd(type(sys)):
                __dict__ = property(lambda self: sys.exit("executed"))
            sys.modules["odd"] = Odd("odd")
            """
        self.assertEqual(self.run_with_popcon(code), (["alpha"], "", "", 0))

    def test_what_was_loaded_under_do_not_track_is_not_sent_though_it_moves(self) -> None:
        code = """
            import os, sys
            os.environ["DO_NOT_TRACK"] = "1"
            import alpha, beta, popcon
            popcon.report()
            del os.environ["DO_NOT_TRACK"]
            sys.modules["alpha"] = sys.modules.pop("alpha")
            import gamma
            """
        self.assertEqual(self.run_with_popcon(code), (["gamma"], "", "", 0))

    def test_a_finder_with_odd_attributes_costs_nobody_a_count(self) -> None:
        code = """
            import alpha, sys
            class Odd:
                path = 5
            class Odder:
                path = property(lambda self: 1 / 0)
            sys.path_importer_cache["/odd"] = Odd()
            sys.path_importer_cache["/odder"] = Odder()
            sys.path_importer_cache["/odd/number"] = 7
            """
        self.assertEqual(self.run_with_popcon(code), (["alpha"], "", "", 0))

    def test_a_name_that_cannot_be_encoded_costs_nobody_a_count(self) -> None:
        code = """
            import alpha, sys
            odd = type(sys)("odd")
            odd.__file__ = "/x/\\ud800.py"
            sys.modules["\\ud800"] = odd
            """
        names, out, err, status = self.run_with_popcon(code, **DEBUG)
        self.assertEqual((names, out, status), (["alpha"], "", 0))
        self.assertIn(r"cannot tell the file of the module \ud800", err)

    def test_debug_says_nothing_on_stdout_if_there_is_no_stderr(self) -> None:
        ended = self.run_with_popcon("import alpha, sys; sys.stderr = None", **DEBUG)
        self.assertEqual(ended, (["alpha"], "", "", 0))

    def test_debug_with_a_full_or_closed_stderr_changes_no_exit_status(self) -> None:
        for stderr in ("os.dup2(os.open('/dev/full', os.O_WRONLY), 2)", "os.close(2)"):
            with self.subTest(stderr=stderr):
                ended = self.run_with_popcon(f"import alpha, os; {stderr}", **DEBUG)
                self.assertEqual(ended, (["alpha"], "", "", 0))

    @unittest.skipUnless(hasattr(os, "fork"), "needs os.fork")
    def test_what_fails_after_a_fork_is_not_seen(self) -> None:
        code = """
            import os, sys, alpha
            os.urandom = None
            if not os.fork():
                sys.exit(0)
            sys.exit(os.wait()[1])
            """
        self.assertEqual(self.run_with_popcon(code), (["alpha"], "", "", 0))

    def test_a_trace_function_is_given_back_and_sees_nothing_of_popcon(self) -> None:
        code = """
            import atexit, sys
            seen = set()
            def trace(frame, event, argument):
                seen.add(frame.f_code.co_filename.rpartition("/")[2])
                return trace
            def check():
                print(sys.gettrace() is trace, sorted(seen & {"popcon.py", "program.py"}))
            atexit.register(check)  # is called after the report
            import popcon; popcon.setup_reporter(); import alpha
            def last(): pass
            sys.settrace(trace)
            last()
            """
        ended = self.run_program(code)
        self.assertEqual(ended, (["alpha"], "True ['program.py']\n", "", 0))

    if hasattr(sys, "monitoring"):  # which came with Python 3.12

        def test_a_debugger_that_uses_monitoring_sees_nothing_of_popcon(self) -> None:
            code = """
                import atexit, sys
                monitoring = sys.monitoring
                seen = set()
                def see(code, *arguments):
                    seen.add(code.co_filename.rpartition("/")[2])
                atexit.register(lambda: print(sorted(seen)))  # is called after the report
                import popcon; popcon.setup_reporter(); import alpha
                def last(): pass
                monitoring.use_tool_id(monitoring.DEBUGGER_ID, "debugger")
                start = monitoring.events.PY_START
                monitoring.register_callback(monitoring.DEBUGGER_ID, start, see)
                monitoring.set_events(monitoring.DEBUGGER_ID, start)
                last()
                """
            ended = self.run_program(code)
            self.assertEqual(ended, (["alpha"], "['program.py']\n", "", 0))

    def test_pdb_does_not_stop_in_popcon(self) -> None:
        code = """
            import io, pdb, sys
            import popcon; popcon.setup_reporter()
            import alpha
            options = {"backend": "monitoring"} if sys.version_info >= (3, 14) else {}
            commands = io.StringIO("step\\n" * 300)
            debugger = pdb.Pdb(stdin=commands, stdout=sys.stdout, **options)
            debugger.set_trace()
            last = 1
            """
        names, out, _, _ = self.run_program(code)
        self.assertEqual(names, ["alpha"])
        self.assertIn("last = 1", out)
        self.assertNotIn("popcon.py", out)

    @unittest.skipUnless(RELATIVES, "needs POPCON_TEST_RELATIVES, a python with coverage")
    def test_coverage_has_nothing_to_warn_of(self) -> None:
        code = """
            import coverage
            coverage.process_startup()
            import popcon; popcon.setup_reporter()
            import alpha
            """
        self.write(self.own, {"settings": "[run]\ntimid = true\n"})
        settings = {"COVERAGE_PROCESS_START": "settings", "COVERAGE_CORE": "pytrace"}
        ended = self.run_program(code, python=RELATIVES, **settings)
        self.assertEqual(ended, (["alpha"], "", "", 0))

    def test_it_reports_where_a_builtin_module_was_loaded_by_somebodys_loader(self) -> None:
        code = """
            import alpha, importlib.util, sys
            class Loader:
                def create_module(self, spec): return None
                def exec_module(self, module): vars(module).update(vars(original))
            for name in ("time", "atexit", "_thread", "_signal", "errno"):
                original = sys.modules.pop(name, None) or __import__(name)
                spec = importlib.util.spec_from_loader(name, Loader())
                sys.modules[name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[name])
            """
        self.assertEqual(self.run_with_popcon(code), (["alpha"], "", "", 0))
        early = f"import sys\n{textwrap.dedent(code).replace('alpha, ', '')}"
        early += "import popcon; popcon.setup_reporter(); import alpha"
        self.assertEqual(self.run_program(early), (["alpha"], "", "", 0))

    @unittest.skipUnless(os.name == "posix", "needs folders as POSIX has them")
    def test_it_reports_where_the_standard_library_lies_in_two_places(self) -> None:
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        original = Path(os.__file__).parent
        pure = self.folder / "pure" / "lib" / version
        extensions = self.folder / "extensions" / "lib" / version
        pure.mkdir(parents=True)
        extensions.mkdir(parents=True)
        for path in original.iterdir():
            if path.name not in ("lib-dynload", "site-packages", "dist-packages"):
                (pure / path.name).symlink_to(path)
        if (original / "lib-dynload").exists():
            (extensions / "lib-dynload").symlink_to(original / "lib-dynload")
        home = f"{self.folder / 'pure'}:{self.folder / 'extensions'}"
        python = os.path.realpath(sys.executable)
        code = "import alpha, sys; assert '_socket' not in sys.modules"
        ended = self.run_with_popcon(code, python=python, PYTHONHOME=home, **DEBUG)
        self.assertEqual(ended[0], ["alpha"], ended)

    def test_it_reports_where_os_is_frozen_in_a_folder_that_is_not_there(self) -> None:
        code = """
            import os
            os.__file__ = "/not/there/os.py"
            import popcon; popcon.setup_reporter(); import alpha
            """
        self.assertEqual(self.run_program(code), (["alpha"], "", "", 0))


class NameServer(threading.Thread):
    """Answers questions of one type (1: A, 28: AAAA), and drops all others."""

    def __init__(self, answers: dict[int, int]) -> None:
        super().__init__(daemon=True)
        self.answers = answers
        self.asked: list[int] = []
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                query, address = self.socket.recvfrom(512)
                record_type = int.from_bytes(query[-4:-2], "big")
                self.asked.append(record_type)
                if record_type in self.answers:
                    number = self.answers[record_type].to_bytes(2, "big")
                    reply = query[:2] + b"\x81\x80\0\1" + number + b"\0\0\0\0"
                    self.socket.sendto(reply + query[12:], address)


class TestNameServers(Case):
    """Of a name, IPv4 is looked up first, and IPv6 only where there is no IPv4."""

    def look_up(
        self,
        answers: dict[int, int],
        host: str = "statsd.example",
        resolv_conf: str = "nameserver 127.0.0.1\n",
        hosts: str = "",
    ) -> tuple[list[Any], list[int]]:
        """Look a host up; return for which families, and what the name server heard."""
        server = NameServer(answers)
        self.addCleanup(server.socket.close)
        families = []

        def getaddrinfo(name: bytes, port: int, family: int, kind: int) -> list[Any]:
            families.append(family)
            record_type = 28 if family == socket.AF_INET6 else 1
            if not answers.get(record_type) and family != socket.AF_UNSPEC:
                raise socket.gaierror("no address of this family")
            return [(family, kind, 0, "", ("127.0.0.1", port))]

        files = {
            "/etc/resolv.conf": resolv_conf.encode(),
            "/etc/hosts": hosts.encode(),
        }
        module = mock.Mock(wraps=popcon.standard_socket())
        module.AF_INET, module.AF_INET6 = socket.AF_INET, socket.AF_INET6
        module.AF_UNSPEC = socket.AF_UNSPEC
        module.SOCK_DGRAM, module.getaddrinfo = socket.SOCK_DGRAM, getaddrinfo
        patches = {
            "NAME_SERVER_PORT": server.socket.getsockname()[1],
            "PATIENCE": 0.2,
            "read": lambda path: files.get(path, b""),
            "standard_socket": lambda: module,
        }
        with mock.patch.multiple(popcon, **patches), contextlib.suppress(OSError):
            popcon.look_up(host, 9125)
        return families, server.asked

    def test_one_that_drops_questions_about_ipv6_is_not_asked_about_it(self) -> None:
        families, asked = self.look_up({1: 1})
        self.assertEqual((families, asked), ([socket.AF_INET], [1]))

    def test_ipv6_is_looked_up_where_there_is_no_ipv4(self) -> None:
        families, asked = self.look_up({1: 0, 28: 1})
        both = [socket.AF_INET, socket.AF_INET6]
        self.assertEqual((families, asked), (both, [1, 28]))

    def test_one_that_drops_questions_about_ipv6_is_not_waited_for_in_vain(self) -> None:
        families, asked = self.look_up({1: 0})
        self.assertEqual((families, asked), ([socket.AF_INET], [1, 28]))

    def assert_not_left_to_getaddrinfo(self, **options: str) -> None:
        families, asked = self.look_up({}, **options)
        self.assertEqual((families, asked), ([], [1]))

    def test_a_silent_one_is_not_left_to_getaddrinfo(self) -> None:
        self.assert_not_left_to_getaddrinfo()

    def test_resolv_conf_may_have_tabs_and_remarks(self) -> None:
        text = "# ours\nnameserver\nnameserver\t127.0.0.1 # ours\nnameserver ::1\n"
        self.assert_not_left_to_getaddrinfo(resolv_conf=text)

    def test_without_a_name_server_it_is_this_machine(self) -> None:
        self.assert_not_left_to_getaddrinfo(resolv_conf="options edns0\n")

    def test_a_search_for_the_root_asks_nothing_twice(self) -> None:
        text = "nameserver 127.0.0.1\nsearch .\n"
        self.assert_not_left_to_getaddrinfo(resolv_conf=text)

    def test_numbers_that_are_no_address_are_looked_up_as_a_name(self) -> None:
        for host in ("10.0.0.256", "10.0.0.08", "1.2.3.4.5"):
            self.assert_not_left_to_getaddrinfo(host=host)

    def test_lines_that_the_system_skips_are_skipped(self) -> None:
        text = " nameserver 127.0.0.9\nnameserver 127.0.0.9;x\nnameserver 127.0.0.1\n"
        self.assert_not_left_to_getaddrinfo(resolv_conf=text)
        self.assert_not_left_to_getaddrinfo(hosts="10.0.0.999 statsd.example\n")

    def test_a_remark_in_the_hosts_file_is_none(self) -> None:
        hosts = "127.0.0.1 localhost # statsd.example\n# 127.0.0.1 statsd.example\n"
        self.assert_not_left_to_getaddrinfo(hosts=hosts)

    def test_what_stands_in_the_hosts_file_asks_nobody(self) -> None:
        families, asked = self.look_up({}, hosts="127.0.0.1\tx Statsd.example\n")
        self.assertEqual((families, asked), ([socket.AF_UNSPEC], []))

    def test_an_address_asks_nobody(self) -> None:
        for host in ("10.0.0.25", "::1", "127.1"):
            families, asked = self.look_up({}, host=host)
            self.assertEqual((families, asked), ([socket.AF_UNSPEC], []), host)


class TestOneState(Libraries):
    """One process has one state, whatever becomes of the module popcon."""

    def setUp(self) -> None:
        super().setUp()
        source = SOURCE.read_text(encoding="utf-8")
        self.write(self.own, {"popcon.py": source})
        newer = re.sub('__version__ = ".*"', '__version__ = "99.0"', source)
        self.newer = self.folder / "newer.py"
        self.newer.write_text(newer, encoding="utf-8")

    def assert_each_once(self, code: str, **options: Any) -> None:
        """A program that uses alpha, beta, gamma after popcon is set up sends each once."""
        names, _, err, status = self.run_program(code, **options)
        self.assertEqual((names, err, status), (["alpha", "beta", "gamma"], "", 0))

    def test_it_is_imported_again(self) -> None:
        self.assert_each_once("""
            import sys, popcon; popcon.setup_reporter()
            import alpha
            del sys.modules["popcon"], popcon
            import popcon; popcon.setup_reporter()
            import beta
            assert popcon.used_libraries() == {"alpha", "beta"}
            assert popcon.report() == ["alpha", "beta"]
            del sys.modules["popcon"]
            import popcon, gamma; popcon.setup_reporter()
            """)

    def test_it_is_imported_again_in_another_version(self) -> None:
        self.assert_each_once(f"""
            import shutil, sys, popcon; popcon.setup_reporter()
            import alpha
            popcon.report()
            shutil.copy({str(self.newer)!r}, popcon.__file__)
            del sys.modules["popcon"]
            import beta, popcon; popcon.setup_reporter()
            assert popcon.__version__ == "99.0"
            import gamma
            """)

    def test_it_is_reloaded(self) -> None:
        self.assert_each_once(f"""
            import importlib, shutil, popcon; popcon.setup_reporter()
            import alpha
            importlib.reload(popcon)
            import beta
            popcon.report()
            shutil.copy({str(self.newer)!r}, popcon.__file__)
            importlib.reload(popcon).setup_reporter()
            assert popcon.__version__ == "99.0"
            import gamma
            """)

    def test_the_last_version_is_in_force_as_a_whole(self) -> None:
        source = self.newer.read_text(encoding="utf-8")
        call = "statsd_line(library, prefix, rate)"
        parameters = 'statsd_line(library: str, prefix: str, rate: str = "1")'
        self.assertIn(call, source)
        self.assertIn(parameters, source)
        source = source.replace(call, "statsd_line(rate, prefix, library)")
        source = source.replace(parameters, "statsd_line(rate, prefix, library)")
        self.newer.write_text(source, encoding="utf-8")
        self.assert_each_once(f"""
            import importlib, shutil, popcon; popcon.setup_reporter()
            import alpha, beta
            shutil.copy({str(self.newer)!r}, popcon.__file__)
            importlib.reload(popcon)
            import gamma
            """)

    def test_the_baseline_stays(self) -> None:
        code = """
            import alpha
            import sys, importlib, popcon; popcon.setup_reporter()
            importlib.reload(popcon).setup_reporter()
            del sys.modules["popcon"]
            import popcon; popcon.setup_reporter()
            import beta
            """
        self.assertEqual(self.run_program(code), (["beta"], "", "", 0))

    @unittest.skipUnless(hasattr(os, "fork"), "needs os.fork")
    def test_a_child_of_a_fork_begins_anew_with_the_last_copy(self) -> None:
        code = """
            import os, sys, popcon; popcon.setup_reporter()
            import alpha
            del sys.modules["popcon"]
            import popcon
            if not os.fork():
                import beta
                sys.exit()
            os.wait()
            """
        self.assertEqual(self.run_program(code)[0], ["alpha", "beta"])

    def test_older_copies_begin_a_process_without_a_baseline(self) -> None:
        reporter = popcon.Reporter()
        self.assertEqual(reporter.baseline, set())
        reporter.begin_process()  # so does the hook after a fork of an older copy
        self.assertIsNone(reporter.baseline)


@unittest.skipUnless(hasattr(signal, "SIGTERM") and os.name == "posix", "needs SIGTERM")
class TestSigterm(Libraries):
    """PYTHON_POPCONTEST_SIGTERM=1 lets a process that gets SIGTERM report."""

    ON: dict[str, Any] = {"PYTHON_POPCONTEST_SIGTERM": "1"}
    END = "os.kill(os.getpid(), signal.SIGTERM)"

    def test_it_reports_and_ends_by_the_signal_all_the_same(self) -> None:
        ended = self.run_with_popcon(f"import alpha, os, signal; {self.END}", **self.ON)
        self.assertEqual(ended, (["alpha"], "", "", -signal.SIGTERM))

    def test_without_it_nothing_is_changed(self) -> None:
        code = "import alpha, os, signal, sys\n"
        code += "sys.stdout.write(str(signal.getsignal(signal.SIGTERM) == 0)); "
        ended = self.run_with_popcon(f"{code} sys.stdout.flush(); {self.END}")
        self.assertEqual(ended, ([], "True", "", -signal.SIGTERM))

    def test_what_was_sent_already_is_not_sent_again(self) -> None:
        code = f"import alpha, os, popcon, signal; popcon.report(); import beta; {self.END}"
        self.assertEqual(self.run_with_popcon(code, **self.ON)[0], ["alpha", "beta"])

    def test_a_handler_of_the_programs_own_is_left_alone(self) -> None:
        before = """
            import os, signal, sys
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
            import popcon; popcon.setup_reporter(); import alpha
            """
        ended = self.run_program(f"{before}{self.END}", **self.ON)
        self.assertEqual(ended, (["alpha"], "", "", 5))
        ignored = before.replace("lambda *_: sys.exit(5)", "signal.SIG_IGN")
        self.assertEqual(self.run_program(f"{ignored}{self.END}", **self.ON)[3], 0)

    def test_a_handler_that_is_set_later_is_left_alone(self) -> None:
        code = """
            import alpha, os, signal, sys
            signal.signal(signal.SIGTERM, lambda *_: os._exit(6))
            """
        ended = self.run_with_popcon(f"{textwrap.dedent(code)}{self.END}", **self.ON)
        self.assertEqual(ended, ([], "", "", 6))

    def test_it_may_be_set_up_in_another_thread(self) -> None:
        code = """
            import popcon, threading
            thread = threading.Thread(target=popcon.setup_reporter)
            thread.start(); thread.join()
            import alpha
            """
        self.assertEqual(self.run_program(code, **self.ON), (["alpha"], "", "", 0))

    def test_a_child_that_gets_it_reports(self) -> None:
        code = """
            import os, signal
            import popcon; popcon.setup_reporter()
            import alpha
            child = os.fork()
            if not child:
                import beta
                os.kill(os.getpid(), signal.SIGTERM)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            os.kill(os.getpid(), signal.SIGTERM)
            """
        names, out, err, status = self.run_program(code, **self.ON)
        self.assertEqual((names, err, status), (["alpha", "beta"], "", -15))
        self.assertEqual(out.replace("\n", ""), "")

    def run_workers(self, method: str) -> list[str]:
        """Terminate a worker of multiprocessing at work; return what was sent."""
        code = f"""
            import multiprocessing, time
            import popcon; popcon.setup_reporter()
            def work(connection):
                import beta
                connection.send(0)
                time.sleep(60)
            if __name__ == "__main__":
                context = multiprocessing.get_context({method!r})
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=[theirs])
                process.start()
                ours.recv()
                process.terminate()
                process.join()
                assert process.exitcode == -15
                import alpha, os, signal
                os.kill(os.getpid(), signal.SIGTERM)
            """
        names, _, err, status = self.run_program(code, **self.ON)
        self.assertEqual((err, status), ("", -15))
        return names

    def test_workers_of_multiprocessing_are_left_alone(self) -> None:
        self.assertEqual(self.run_workers("fork"), ["alpha"])
        self.assertEqual(self.run_workers("spawn"), ["alpha"])
        self.assertEqual(self.run_workers("forkserver"), ["alpha"])

    def test_a_worker_that_forks_is_left_alone(self) -> None:
        code = """
            import multiprocessing, os, signal
            import popcon; popcon.setup_reporter()
            def work(connection):
                if not os.fork():
                    os._exit(0)
                os.wait()
                connection.send(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
            context = multiprocessing.get_context("fork")
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=[theirs])
            process.start()
            print(ours.recv(), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
            process.join()
            """
        ended = self.run_program(code, **self.ON)
        self.assertEqual(ended, ([], "True False\n", "", 0))

    def test_a_default_handler_that_is_set_later_stays_through_a_fork(self) -> None:
        code = """
            import os, signal
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if not os.fork():
                os._exit(0)
            os.wait()
            print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
            """
        ended = self.run_with_popcon(code, **self.ON)
        self.assertEqual(ended, ([], "True\n", "", 0))

    def test_a_handler_of_the_programs_own_may_be_any_object(self) -> None:
        code = """
            import os, signal
            class Handler:
                def __call__(self, *arguments): pass
                def __eq__(self, other): 1 / 0
                def __getattr__(self, name): 1 / 0
            signal.signal(signal.SIGTERM, Handler())
            import popcon; popcon.setup_reporter()
            import alpha
            if not os.fork():
                os._exit(0)
            os.wait()
            """
        self.assertEqual(self.run_program(code), (["alpha"], "", "", 0))
        self.assertEqual(self.run_program(code, **self.ON), (["alpha"], "", "", 0))

    def test_a_method_of_the_programs_own_stays_through_a_fork(self) -> None:
        code = """
            import os, signal
            class Program:
                def end(self, *arguments):
                    os._exit(7)
            signal.signal(signal.SIGTERM, Program().end)
            if not os.fork():
                os.kill(os.getpid(), signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
            os.kill(os.getpid(), signal.SIGTERM)
            """
        ended = self.run_with_popcon(code, **self.ON)
        self.assertEqual(ended, ([], "", "", 7))

    def test_a_handler_of_the_programs_own_may_call_ours(self) -> None:
        code = """
            import alpha, os, signal
            earlier = signal.getsignal(signal.SIGTERM)
            def end(*arguments):
                import beta
                earlier(*arguments)
                print("saved")
                raise SystemExit(5)
            signal.signal(signal.SIGTERM, end)
            os.kill(os.getpid(), signal.SIGTERM)
            """
        ended = self.run_with_popcon(code, **self.ON)
        self.assertEqual(ended, (["alpha", "beta"], "saved\n", "", 5))

    def test_a_handler_that_python_does_not_know_stays_through_a_fork(self) -> None:
        code = """
            import faulthandler, os, signal
            faulthandler.register(signal.SIGTERM, open(os.devnull, "w"))
            if not os.fork():
                os._exit(0)
            os.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            import alpha
            """
        ended = self.run_with_popcon(code, **self.ON)
        self.assertEqual(ended, (["alpha"], "", "", 0))

    def test_the_handler_stays_where_threads_fork_at_the_same_time(self) -> None:
        code = f"""
            import alpha, os, signal, sys, threading, warnings
            sys.setswitchinterval(1e-6)
            def fork():
                for _ in range(150):
                    child = os.fork()
                    if not child:
                        os._exit(0)
                    os.waitpid(child, 0)
            warnings.simplefilter("ignore")  # a fork beside a thread
            thread = threading.Thread(target=fork)
            thread.start()
            fork()
            thread.join()
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
            {self.END}
            """
        ended = self.run_with_popcon(code, **self.ON)
        self.assertEqual(ended, (["alpha"], "", "", -signal.SIGTERM))

    def test_it_waits_while_a_fork_is_under_way(self) -> None:
        # Functions that are registered earlier run nearer to the fork.
        code = """
            import os, signal
            def blocked():
                return signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGTERM}
            def end():
                assert blocked()
                os.kill(os.getpid(), signal.SIGTERM)
            def check():
                assert blocked()
            os.register_at_fork(before=check, after_in_parent=check, after_in_child=end)
            import popcon; popcon.setup_reporter()
            assert not blocked()
            child = os.fork()
            if not child:
                os._exit(0)
            assert not blocked()
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -15
            """
        self.assertEqual(self.run_program(code, **self.ON), ([], "", "", 0))

    def test_a_program_that_holds_it_back_itself_goes_on_to_do_so(self) -> None:
        code = """
            import os, signal
            if not os.fork():
                os._exit(0)
            os.wait()
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            if not os.fork():
                blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
                os._exit(blocked != {signal.SIGTERM})
            assert os.wait()[1] == 0
            assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGTERM}
            """
        ended = self.run_with_popcon(code, **self.ON)
        self.assertEqual(ended, ([], "", "", 0))

    def test_without_it_a_fork_holds_nothing_back(self) -> None:
        code = """
            import os, signal
            def check():
                assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
            os.register_at_fork(before=check)
            import popcon; popcon.setup_reporter()
            if not os.fork():
                os._exit(0)
            os.wait()
            """
        self.assertEqual(self.run_program(code), ([], "", "", 0))

    def test_it_ends_a_program_that_took_os_kill_away(self) -> None:
        code = f"import alpha, os, signal; kill = os.kill; os.kill = None; {self.END}"
        code = code.replace("os.kill(os.getpid()", "kill(os.getpid()")
        ended = self.run_with_popcon(code, **self.ON)
        self.assertEqual(ended, (["alpha"], "", "", -signal.SIGTERM))

    def test_a_handler_of_c_code_is_left_alone(self) -> None:
        changed = []
        signals = types.SimpleNamespace(
            SIGTERM=signal.SIGTERM,
            SIG_DFL=signal.SIG_DFL,
            getsignal=lambda number: None,
            signal=lambda number, handler: changed.append(handler),
        )
        with mock.patch.object(popcon, "_signal", signals):
            popcon.Reporter().uncatch_sigterm()
        self.assertEqual(changed, [])

    def test_a_handler_that_is_set_during_a_report_gets_the_signal_once(self) -> None:
        code = """
            import alpha, os, popcon, signal
            read = popcon.read
            received = []
            def interrupted(path):
                popcon.read = read
                os.kill(os.getpid(), signal.SIGTERM)
                signal.signal(signal.SIGTERM, lambda *_: received.append("signal"))
                return read(path)
            popcon.read = interrupted
            popcon.report()
            popcon.report()
            print(received)
            """
        ended = self.run_with_popcon(code, **self.ON)
        self.assertEqual(ended, (["alpha"], "['signal']\n", "", 0))

    def test_it_ends_a_program_that_replaced_functions_of_thread(self) -> None:
        # As gevent does: idents of greenlets are no threads.
        code = f"""
            import _thread, alpha, os, popcon, signal
            _thread.get_ident = lambda: 12345
            read = popcon.read
            def interrupted(path):
                popcon.read = read
                {self.END}
                return read(path)
            popcon.read = interrupted
            popcon.report()
            """
        ended = self.run_with_popcon(code, **self.ON)
        self.assertEqual(ended, (["alpha"], "", "", -signal.SIGTERM))

    def test_a_pool_ends_its_workers(self) -> None:
        code = """
            import multiprocessing
            import popcon; popcon.setup_reporter()
            import alpha
            context = multiprocessing.get_context("fork")
            for _ in range(60):
                with context.Pool(4) as pool:
                    pool.map(abs, range(20))
            """
        ended = self.run_program(code, **self.ON)
        self.assertEqual(ended, (["alpha"], "", "", 0))

    def test_it_ends_the_process_after_a_reload(self) -> None:
        code = """
            import alpha, importlib, os, popcon, signal
            importlib.reload(popcon).setup_reporter()
            if not os.fork():
                os.kill(os.getpid(), signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.wait()[1]) == -15
            os.kill(os.getpid(), signal.SIGTERM)
            """
        ended = self.run_with_popcon(code, **self.ON)
        self.assertEqual(ended, (["alpha"], "", "", -signal.SIGTERM))

    def test_one_that_comes_during_a_report_ends_the_process_after_it(self) -> None:
        code = """
            import alpha, os, popcon, signal
            read = popcon.read
            def interrupted(path):
                popcon.read = read
                os.kill(os.getpid(), signal.SIGTERM)
                return read(path)
            popcon.read = interrupted
            popcon.report()
            print("never printed")
            """
        ended = self.run_with_popcon(code, **self.ON)
        self.assertEqual(ended, (["alpha"], "", "", -signal.SIGTERM))

    def test_one_that_comes_during_a_report_of_another_thread_wakes_the_program(self) -> None:
        code = """
            import alpha, os, popcon, signal, threading, time
            send = popcon.send
            def send_slowly(*arguments):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3)
                send(*arguments)
            popcon.send = send_slowly
            threading.Thread(target=popcon.report).start()
            signal.alarm(9)  # this would end it, too, but by another signal
            threading.Event().wait()
            """
        ended = self.run_with_popcon(code, **self.ON)
        self.assertEqual(ended, (["alpha"], "", "", -signal.SIGTERM))

    @unittest.skipUnless(RELATIVES, "needs POPCON_TEST_RELATIVES, a python with uvicorn")
    def test_uvicorn_reports_for_it_raises_the_signal_after_its_own_handler(self) -> None:
        code = """
            import popcon; popcon.setup_reporter()
            import os, signal, threading, time
            import uvicorn, alpha
            async def app(scope, receive, send):
                assert scope["type"] == "lifespan"
                await receive()
                await send({"type": "lifespan.startup.complete"})
                os.kill(os.getpid(), signal.SIGTERM)
                await receive()
                await send({"type": "lifespan.shutdown.complete"})
            uvicorn.run(app, port=0, log_level="critical", lifespan="on")
            """
        names, _, err, status = self.run_program(code, python=RELATIVES, **self.ON)
        self.assertEqual((err, status), ("", -signal.SIGTERM))
        self.assertIn("alpha", names)
        self.assertIn("uvicorn", names)


# Drives a real kernel through cells, and to its end, and prints what each cell printed.
KERNEL = """
import json, sys
from jupyter_client.manager import start_new_kernel

def execute(cell):
    # Now and then a kernel on 3.10 does not hear a request, with or without popcon. So
    # ask again. What was heard is not asked again: if popcon hangs after a cell, the
    # cell has begun.
    for _ in range(2):
        heard = []
        try:
            client.execute_interactive(cell, timeout=60, output_hook=heard.append)
        except TimeoutError:
            if heard:
                sys.exit(f"no end of {cell!r}: {heard}")
        else:
            return text_of(heard)
    sys.exit(f"nothing was heard of {cell!r}")

def text_of(messages):
    text = ""
    for message in messages:
        content = message["content"]
        text += content.get("text") or "".join(content.get("traceback", ()))
    return text

manager, client = start_new_kernel(kernel_name="python3", startup_timeout=60)
manager.shutdown_wait_time = 60
out = [execute(cell) for cell in cells]
if end == "restart":
    manager.restart_kernel(now=True)
    client.wait_for_ready(timeout=60)
manager.shutdown_kernel(now=end == "kill")
print(json.dumps(out))
"""
SHELLS_FOLDERS = "HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"


def kernel_code(*cells: str, end: str) -> str:
    """Return code that drives a real kernel through cells.

    end: "shutdown", "kill", or "restart" and then a shutdown
    """
    return f"cells, end = {cells!r}, {end!r}\n{KERNEL}"


@unittest.skipUnless(
    JUPYTER, "needs POPCON_TEST_JUPYTER, a python with ipykernel, bs4, sympy"
)
class TestShells(Case):
    def setUp(self) -> None:
        super().setUp()
        self.startup = self.own / "profile_default" / "startup"
        self.write(self.startup, {"000-popcon.py": readme_block("python", "try:")})
        self.install("alpha", "alpha.py")
        self.server: Server = self.open(Server())

    def run_shell(
        self, code: str, python: str = JUPYTER, **settings: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run code where IPython is, and reports to the server."""
        folders = dict.fromkeys(SHELLS_FOLDERS, str(self.own))
        settings = {**self.server.settings, **folders, **settings}
        return self.run_python(code, "-W", "ignore", python=python, **settings)

    def run_kernel(
        self, *cells: str, end: str = "shutdown", **settings: str
    ) -> list[str]:
        """Run cells in a real kernel, and return what each of them printed."""
        code = kernel_code(*cells, end=end)
        ended = self.run_shell(code, **settings)
        if "nothing was heard" in ended.stderr:
            # Now and then a kernel on 3.10 hears nothing any more, with or without
            # popcon.
            self.server.received()
            ended = self.run_shell(code, **settings)
        self.assertEqual(ended.returncode, 0, ended.stderr[-2000:])
        out: list[str] = json.loads(ended.stdout.splitlines()[-1])
        return out

    def test_a_session_that_uses_no_library_sends_nothing(self) -> None:
        ask = """
kernel = get_ipython().kernel
print(kernel.do_inspect("len", 3)["found"])
print(kernel.do_complete("import o", 8)["matches"])
print(kernel.do_complete("pri", 3)["matches"])
"""
        cells = ["1+1", "print('hi')", "1/0", ask, "%timeit -n1 -r1 1", "%pwd", "%who"]
        out = self.run_kernel(*cells)
        self.assertEqual(out[1], "hi\n")
        self.assertIn("ZeroDivisionError", out[2])
        self.assertRegex(out[3], "^True\n.*'os'.*\n.*'print'")
        self.assertNotIn("popcon", "".join(out[:-1]))
        self.assertEqual(self.server.names(0.5), [])

    def run_late_session(self, cell: str) -> list[str]:
        """Run a session in a process in which popcon is set up and alpha is loaded.

        Returns what it sent.
        """
        early = "import popcon; popcon.setup_reporter(); import alpha"
        self.write(self.site, {"sitecustomize.py": early})
        start = "from IPython import start_ipython\n"
        self.run_shell(f"{start}start_ipython(['--quick', '-c', {cell!r}])")
        return self.server.names()

    def test_a_session_that_comes_after_the_setup_counts_no_shell(self) -> None:
        self.assertEqual(self.run_late_session("1/0"), ["alpha"])

    def test_a_session_that_comes_after_the_setup_counts_its_cells(self) -> None:
        self.install("beta", "beta.py")
        names = self.run_late_session("import beta")
        self.assertEqual(names, ["alpha", "beta"])

    def test_what_is_imported_in_cells_counts_once(self) -> None:
        last = "import bs4; print(popcon.report())"
        cells = ["import popcon, sympy", "1/0", "import sympy, alpha", "%reset -f"]
        out = self.run_kernel(*cells, "import popcon; " + last)
        self.assertIn("'beautifulsoup4'", out[-1])
        names = self.server.names(0.5)
        for name in ("alpha", "beautifulsoup4", "sympy", "mpmath"):
            self.assertEqual(names.count(name), 1, name)
        self.assertEqual(len(names), len(set(names)))
        for name in ("ipython", "ipykernel", "executing", "stack-data", "jedi", "six"):
            self.assertNotIn(name, names)

    def test_what_a_library_of_the_baseline_requires_counts(self) -> None:
        metadata = {"METADATA": "Name: helper\nRequires-Dist: alpha\n"}
        self.install("helper", "helper.py", more=metadata)
        self.write(self.site, {"sitecustomize.py": "import helper"})
        self.run_kernel("import alpha, helper")
        self.assertEqual(self.server.names(0.5), ["alpha"])

    def test_a_second_setup_in_a_session_reports_after_a_cell_once(self) -> None:
        cell = """
import popcon
popcon.setup_reporter()
popcon.setup_reporter()
hooks = get_ipython().events.callbacks["post_execute"]
print(hooks.count(popcon._reporter.report_after_cell))
"""
        self.assertEqual(self.run_kernel(cell), ["1\n"])

    def check_end(self, end: str) -> None:
        """Check that a kernel which ends like this loses nothing of an earlier cell.

        Its popcon fails in the end, and no cell shows it.
        """
        fail = "import popcon; popcon.modules_mark = lambda: 1 / 0"
        out = self.run_kernel("import alpha", fail, "print(2)", end=end)
        self.assertEqual(out, ["", "", "2\n"])
        self.assertEqual(self.server.names(0.5), ["alpha"])

    def test_a_kernel_that_is_killed_loses_nothing_of_an_earlier_cell(self) -> None:
        self.check_end("kill")

    def test_a_kernel_that_is_restarted_loses_nothing_of_an_earlier_cell(self) -> None:
        self.check_end("restart")

    def test_a_silent_name_server_is_asked_once_in_a_kernel_and_at_exit(self) -> None:
        name_server = self.open(Server())
        code = name_server.code_to_ask_it_for_names()
        self.write(self.startup, {"001-silent.py": code})
        cells = ["import alpha", "import bs4", "import sympy"]
        self.run_kernel(*cells, PYTHON_POPCONTEST_STATSD_HOST="statsd.example")
        self.assertEqual(len(name_server.received(0.5)), 2)

    def test_ipython_in_a_terminal_counts_what_is_imported(self) -> None:
        code = r"""
            import pexpect, sys
            arguments = ["-m", "IPython", "--simple-prompt", "--no-banner"]
            shell = pexpect.spawn(
                sys.executable, arguments, encoding="utf-8", timeout=60
            )
            for line in ("1/0", "import alpha", "print(6 * 7)"):
                shell.expect(r"In \[\d+\]: ")
                shell.sendline(line)
            shell.expect(r"42\s+In \[4\]: ")
            shell.kill(9)
            """
        ended = self.run_shell(code)
        self.assertEqual(ended.returncode, 0, ended.stderr)
        self.assertEqual(self.server.names(0.5), ["alpha"])

    def test_an_extension_that_a_person_chose_counts_with_what_it_imports(self) -> None:
        source = "import alpha\n"
        source += "def load_ipython_extension(shell): import chosen_more, IPython.lib.demo\n"
        self.install("chosen", "chosen.py", "chosen_more.py", source=source)
        settings = "c.InteractiveShellApp.extensions = ['chosen', 'autoreload']\n"
        files = ("ipython_config.py", "ipython_kernel_config.py")
        self.write(self.startup.parent, dict.fromkeys(files, settings))
        self.run_kernel("1+1")
        self.assertEqual(self.server.names(0.5), ["alpha", "chosen"])
        early = "import popcon; popcon.setup_reporter()"
        self.write(self.site, {"sitecustomize.py": early})
        self.run_shell("import IPython; IPython.start_ipython(['-c', '1+1'])")
        self.assertEqual(self.server.names(), ["alpha", "chosen"])

    def test_a_shell_that_ipdb_makes_is_no_session(self) -> None:
        self.write(self.site, {"sitecustomize.py": readme_block("python", "try:")})
        code = """
            from IPython.terminal.ipapp import TerminalIPythonApp
            import alpha
            application = TerminalIPythonApp()
            application.interact = False
            application.initialize(["--no-term-title"])
            """
        self.run_shell(textwrap.dedent(code))
        names = self.server.names()
        self.assertIn("alpha", names)
        self.assertIn("ipython", names)

    @unittest.skipUnless(LARGE, "needs POPCON_TEST_LARGE, a python with matplotlib")
    def test_matplotlib_that_a_person_asks_for_counts(self) -> None:
        code = "import IPython; IPython.start_ipython(['--matplotlib=agg', '-c', '1+1'])"
        self.run_shell(code, python=LARGE)
        names = self.server.names()
        self.assertLessEqual({"matplotlib", "numpy", "pillow"}, set(names))
        self.assertNotIn("traitlets", names)

    @unittest.skipUnless(LARGE, "needs POPCON_TEST_LARGE, a python with django")
    def test_what_a_kernels_debugger_loads_does_not_count(self) -> None:
        self.write(
            self.startup.parent,
            {"ipython_kernel_config.py": "c.IPKernelApp.matplotlib = 'inline'"},
        )
        self.run_kernel("1+1")
        names = self.server.names(0.5)
        self.assertIn("matplotlib", names)
        self.assertNotIn("django", names)

    def test_autoreload_of_another_version_loses_nothing_and_sends_nothing_twice(self) -> None:
        source = SOURCE.read_text(encoding="utf-8")
        newer = re.sub('__version__ = ".*"', '__version__ = "99.0"', source)
        self.write(self.site, {"popcon.py": source})
        for name in ("beta", "gamma"):
            self.install(name, f"{name}.py")
        (self.folder / "newer.py").write_text(newer, encoding="utf-8")
        copied = "import popcon, shutil; shutil.copy"
        copied += f"({str(self.folder / 'newer.py')!r}, popcon.__file__);"
        out = self.run_kernel(
            "%load_ext autoreload",
            "%autoreload 2",
            "import alpha",
            copied,
            "import beta",
            "import gamma; print(popcon.__version__)",
            "popcon.setup_reporter(); print(sorted(popcon.used_libraries()))",
        )
        self.assertEqual(out[-2:], ["99.0\n", "['alpha', 'beta', 'gamma']\n"])
        self.assertEqual(self.server.names(0.5), ["alpha", "beta", "gamma"])


# ---- real libraries, real servers ---------------------------------------------------

# Reads all metadata by the slow and plain way of the standard library, and prints which
# files are whose.
ALL_FILES = """
import importlib.metadata, json, re
owners = {}
for one in importlib.metadata.distributions():
    if '"editable"' in (one.read_text("direct_url.json") or ""):
        continue
    name = re.sub("[-_.]+", "-", one.metadata["Name"]).lower()
    for file in one.files or ():
        owners.setdefault(str(one.locate_file(file)), []).append(name)
print(json.dumps(owners))
"""

# Asks every module for its file in the plain way, and looks that up. It shares nothing
# with popcon.
ORACLE = r"""
import importlib, json, os, sys
owners = json.load(open(sys.argv[1]))
before, after = sys.argv[2].split(":")

def loaded():
    names = set()
    for module in list(sys.modules.values()):
        if isinstance(module, type(sys)):
            spec = getattr(module, "__spec__", None)
            file = getattr(module, "__file__", None)
            if spec is not None and spec.has_location:
                file = spec.origin
            names.update(owners.get(str(file), ()))
    return names

for name in before.split():
    importlib.import_module(name)
import popcon
popcon.setup_reporter()
baseline = loaded()
for name in after.split():
    importlib.import_module(name)
ours = popcon.used_libraries()
print("\n" + json.dumps([sorted(ours), sorted(loaded() - baseline)]), flush=True)
os._exit(0)  # what some of them do at exit is not our business
"""

# A session each line: before the colon what it imports before popcon is set up. The
# names of the modules are unlike those of the libraries on purpose.
SESSIONS = """
: pandas matplotlib.pyplot sklearn.linear_model scipy.stats seaborn statsmodels.api
: yaml PIL.Image cv2 bs4 dateutil.parser _cffi_backend lxml.etree docx OpenSSL attr
: six.moves.urllib.parse
: google.cloud.storage google.protobuf.message
: google.auth
: google.cloud.bigquery google.api_core
: azure.identity
: azure.storage.blob azure.core
: opentelemetry.sdk.trace
: opentelemetry.trace
: zope.interface
: ruamel.yaml
: backports.tarfile
: jaraco.functools
: pip._vendor.rich pip._internal.cli.main
: librosa skimage.filters nilearn.plotting
: tlz distributed dask.dataframe xarray zarr
: twisted.internet.defer scrapy nacl paramiko
: ipykernel jupyter_client jupyterlab notebook
pandas IPython: matplotlib.pyplot pandas.io.excel requests IPython.display
google.auth: google.cloud.storage
six numpy: dateutil.rrule numpy.fft numba
"""


class TestRealThings(Case):
    @unittest.skipUnless(
        LARGE, "needs POPCON_TEST_LARGE, a python with several hundred libraries"
    )
    def test_agrees_with_a_plain_reading_of_all_metadata(self) -> None:
        owners = self.folder / "owners.json"
        reading = self.run_python(ALL_FILES, "-W", "ignore", python=LARGE)
        owners.write_text(reading.stdout)

        def run_session(line: str) -> Any:
            arguments = [str(owners), line]
            result = self.run_python(ORACLE, python=LARGE, arguments=arguments)
            assert result.returncode == 0, line + result.stderr[-1000:]
            return json.loads(result.stdout.splitlines()[-1])

        total = set()
        lines = SESSIONS.strip().split("\n")
        with ThreadPoolExecutor(2) as pool:
            for line, found in zip(lines, pool.map(run_session, lines)):
                ours, oracle = found
                with self.subTest(line=line):
                    self.assertEqual(ours, oracle)
                    self.assertTrue(ours)
                    total.update(ours)
        self.assertGreater(len(total), 100)

    # Random metadata

    PARTS = [
        b"a/b.py",
        b"Name:",
        b" x",
        b":1|c",
        b"..",
        b"/",
        b"a",
        b"top",
        b"(",
        b"[",
        b"]",
        b"good.py",
        b'; extra == "x"',
        b"Requires-Dist:",
        b",",
        b'"',
        b"\n",
        b"\r\n",
        b"\0",
        b"\xff",
        b"\xc3\xa9",
    ]
    FOLDERS = [
        "a-1.dist-info",
        "A.egg-info",
        "b.dist-info",
        ".dist-info",
        "-.dist-info",
        "ipython.egg-info",
    ]
    BEGINNINGS = {
        "RECORD": b"a/b.py,\n",
        "METADATA": b"Name:",
        "PKG-INFO": b"Name:",
        "top_level.txt": b"top\n",
        "direct_url.json": b"{",
    }

    def write_random_metadata(self, chance: random.Random) -> None:
        """Write nine files of metadata, which begin well more often than not."""
        for _ in range(9):
            folder = self.site / chance.choice(self.FOLDERS)
            name = chance.choice(list(self.BEGINNINGS))
            parts = chance.choices(self.PARTS, k=chance.randrange(9))
            content = chance.choice([b"".join(parts), chance.randbytes(60)])
            if chance.random() < 0.7:
                content = self.BEGINNINGS[name] + content
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)

    def test_no_metadata_raises_or_adds_a_line_or_hides_another_library(self) -> None:
        for seed in range(400):
            shutil.rmtree(self.site)
            self.install("good", "good.py")
            self.write_random_metadata(random.Random(seed))
            found = self.owners("good.py", "a/b.py", "top.py")
            self.assertIn("good", found, seed)
            for name in found:
                line = popcon.statsd_line(name, "p").decode()
                expected = r"\Ap\.[a-z0-9]+(-[a-z0-9]+)*:1\|c\Z"
                self.assertRegex(line, expected, seed)
            popcon.required_by_shell({str(self.site / "good.py")})

    # Debian

    # For its parsers, bs4 imports what happens to be installed.
    IN_DEBIAN = """
import sys
sys.path.append("/tmp")
import popcon
popcon.setup_reporter()
import {}
parsers_of_bs4 = {{"lxml", "chardet", "html5lib"}}
print(*sorted(popcon.used_libraries() - parsers_of_bs4))
"""

    def assert_used_in_debian(self, module: str, *libraries: str) -> None:
        for root in DEBIAN:
            copy = shutil.copy(SOURCE, f"{root}/tmp")
            self.addCleanup(Path(copy).unlink, missing_ok=True)
            code = self.IN_DEBIAN.format(module)
            with self.subTest(root=root):
                ended = subprocess.run(
                    ["chroot", root, "python3", "-B", "-c", code],
                    env={"PATH": "/usr/sbin:/usr/bin:/bin"},
                    capture_output=True,
                    text=True,
                )
                self.assertEqual(ended.stderr, "")
                self.assertEqual(ended.stdout.split(), list(libraries))

    @unittest.skipUnless(
        DEBIAN, "needs POPCON_TEST_DEBIAN, roots with python3 and what is below"
    )
    def test_is_right_where_debian_left_no_record(self) -> None:
        self.assert_used_in_debian("json")
        self.assert_used_in_debian("numpy", "numpy")
        self.assert_used_in_debian("yaml", "pyyaml")
        self.assert_used_in_debian("six", "six")
        self.assert_used_in_debian("six.moves.urllib", "six")
        self.assert_used_in_debian("ruamel.yaml", "ruamel-yaml", "ruamel-yaml-clib")
        bs4 = ["beautifulsoup4", "soupsieve", "typing-extensions"]
        self.assert_used_in_debian("bs4", *bs4)

    # Servers

    LOAD = """
import os, sys
import popcon
popcon.setup_reporter()
gate, opener = os.pipe()
for _ in range(500):
    if not os.fork():
        os.close(opener)
        for number in range(50):
            __import__(f"library_{number}")
        os.read(gate, 1)  # which ends when the parent closes the pipe
        sys.exit()
os.close(opener)
for _ in range(500):
    os.wait()
"""

    def load(self, settings: dict[str, Any]) -> dict[str, int]:
        """Let 500 processes end at once that used 50 libraries each.

        Returns what a server has to count.
        """
        counts = {}
        for number in range(50):
            self.install(f"library-{number}", f"library_{number}.py")
            counts[f"library-{number}"] = 500
        result = self.run_python(self.LOAD, **settings)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        return counts

    def wait_for_counts(
        self, settings: dict[str, Any], read_counts: Callable[[], Any]
    ) -> dict[str, float]:
        """Return what a server counted for popcon, and how many lines were bad.

        That is complete when it has counted a datagram that comes after all others.
        """
        port = int(settings["PYTHON_POPCONTEST_STATSD_PORT"])
        popcon.send([b"last:1|c"], "127.0.0.1", port)
        self.wait_until(lambda: "last" in read_counts())
        counts = {}
        for name, count in read_counts().items():
            if name.startswith("python_popcon") or "bad_" in name:
                counts[name] = count
        return counts

    @unittest.skipUnless(
        EXPORTER, "needs POPCON_TEST_STATSD_EXPORTER, the path of statsd_exporter"
    )
    def test_the_real_exporter_counts_each_process_once(self) -> None:
        self.install("alpha", "alpha.py")
        self.install("ruamel.yaml", "ruamel.py")
        setup = "import popcon; popcon.setup_reporter(); "
        with self.exporter() as (settings, metrics):
            for prefix in ("", "python_popcon.namespace.prod.library_used"):
                settings["PYTHON_POPCONTEST_STATSD_PREFIX"] = prefix
                self.run_python(setup + "import alpha", **settings)
                self.run_python(setup + "import alpha, ruamel", **settings)
                self.run_python(setup + "import json", **settings)
            settings["PYTHON_POPCONTEST_STATSD_PREFIX"] = ""
            self.run_python("import popcon; popcon.main(['selftest'])", **settings)
            loaded = self.load(settings)
            counted = self.wait_for_counts(settings, metrics)
        expected = {
            'library="alpha"': 2,
            'library="alpha",namespace="prod"': 2,
            'library="ruamel-yaml"': 1,
            'library="ruamel-yaml",namespace="prod"': 1,
        }
        for name, count in loaded.items():
            expected[f'library="{name}"'] = count
        series = {}
        for labels, count in expected.items():
            series[f"python_popcon_library_used{{{labels}}}"] = count
        self.assertEqual(counted, series)

    # The reference server has no setting for its receive buffer; for real ones, there
    # is sysctl net.core.rmem_default.
    LARGE_BUFFER = """
const dgram = require("dgram");
const create = dgram.createSocket;
dgram.createSocket = (type, call) => create({type, recvBufferSize: 4194304}, call);
"""

    def start_reference_server(self) -> tuple[dict[str, Any], Callable[[], Any]]:
        """Start the reference statsd server.

        Returns the settings for it, and a function that returns its counters.
        """
        port = free_port(socket.SOCK_DGRAM)
        management_port = free_port()
        config = {
            "port": port,
            "address": "127.0.0.1",
            "backends": [],
            "flushInterval": 600000,
            "mgmt_port": management_port,
            "mgmt_address": "127.0.0.1",
        }
        files = {"config.js": json.dumps(config), "buffer.js": self.LARGE_BUFFER}
        self.write(self.folder, files)
        self.start("node", "-r", "./buffer.js", STATSD, "config.js")

        def counters() -> dict[str, int]:
            address = ("127.0.0.1", management_port)
            with socket.create_connection(address, timeout=5) as management:
                management.sendall(b"counters\n")
                lines = iter(management.makefile().readline, "END\n")
                answer = "".join(lines)
            counts = {}
            for name, count in re.findall(r"'?([\w.-]+)'?: (\d+)", answer):
                counts[name] = int(count)
            return counts

        self.wait_until(counters)
        return settings_for(port), counters

    @unittest.skipUnless(
        STATSD, "needs POPCON_TEST_STATSD, the reference server's stats.js"
    )
    def test_the_reference_server_scales_samples_and_loses_nothing(self) -> None:
        self.install("alpha", "alpha.py")
        code = """
            import popcon; popcon.setup_reporter()
            popcon._reporter.draw = 0.0
            import alpha
            """
        settings, counters = self.start_reference_server()
        settings["PYTHON_POPCONTEST_STATSD_SAMPLE_RATE"] = "0.1"
        self.run_python(code, **settings)
        settings["PYTHON_POPCONTEST_STATSD_SAMPLE_RATE"] = "1"
        self.run_python(code, **settings)
        expected = {f"{PREFIX}alpha": 11, "statsd.bad_lines_seen": 0}
        for name, count in self.load(settings).items():
            expected[f"{PREFIX}{name}"] = count
        self.assertEqual(self.wait_for_counts(settings, counters), expected)


# ---- the commands -------------------------------------------------------------------

ALPHA = f"{PREFIX}alpha:1|c"
NOTHING = "popcon: nothing would be sent: no library was used, or none since the last report"
REAL_SERVERS = os.environ.get("POPCON_TEST_PROMETHEUS", "").split(":")
REAL_SERVERS.append(os.environ.get("POPCON_TEST_VICTORIAMETRICS", ""))
REAL_SERVERS = [path for path in REAL_SERVERS if path]
SHELLS = [path for path in map(shutil.which, ("bash", "dash", "busybox")) if path]


class Lone(Case):
    """A folder with popcon.py in it, and nothing else."""

    def setUp(self) -> None:
        super().setUp()
        self.lone = self.folder / "lone"
        self.write(self.lone, {"popcon.py": SOURCE.read_text("utf-8")})

    def popcon(
        self, line: str, start: str = "popcon.py", **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `python popcon.py LINE` there, with these variables in the environment."""
        return self.popcon_with({}, line, start, **settings)

    def popcon_with(
        self,
        options: dict[str, Any],
        line: str,
        start: str = "popcon.py",
        **settings: str,
    ) -> subprocess.CompletedProcess[str]:
        """Do the same, with options for subprocess.run()."""
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL}
        streams["stdout"] = subprocess.PIPE
        streams["stderr"] = subprocess.PIPE
        command = [sys.executable, *shlex.split(start), *shlex.split(line)]
        return subprocess.run(
            command,
            cwd=self.lone,
            env=settings,
            text=True,
            timeout=120,
            **(streams | options),
        )


class TestOptions(Lone):
    def test_misuse_gets_one_sentence(self) -> None:
        expected = {
            "": "required: COMMAND; -h tells more",
            "nonsense": "nonsense",
            "install now": "now",
            "install --al-processes": "--al-processes",
            "run": "a program is missing",
            "run --explain -c": "a program is missing",
            "run -W error x.py": "-W",
            "selftest --metrics x --prometheus y": "not allowed with",
            "collect": "required: FILE",
            "collect x --listen 9125": "it must be as 0.0.0.0:9125, or as",
            "collect x --listen localhost:http": "it must be as 0.0.0.0:9125, or as",
            "collect x --listen localhost:65536": "it must be as 0.0.0.0:9125, or as",
            "collect x --listen ::1": "it must be as 0.0.0.0:9125, or as",
            "collect x --listen 127.0.0.1:0": "it must be as 0.0.0.0:9125, or as",
        }
        for line, words in expected.items():
            with self.subTest(line=line):
                ended = self.popcon(line)
                self.assertEqual((ended.returncode, ended.stdout), (2, ""))
                self.assertRegex(ended.stderr, rf"\Apopcon: .*{words}.*\n\Z")
        self.assertEqual(os.listdir(self.lone), ["popcon.py"])

    def test_version(self) -> None:
        self.assertEqual(
            self.popcon("--version").stdout, f"popcon {popcon.__version__}\n"
        )

    def test_help_names_each_command_and_the_setting_that_is_needed(self) -> None:
        said = self.popcon("-h").stdout
        for name in ("selftest", "run", "install", "uninstall", "collect", "usage"):
            self.assertRegex(said, rf"(?m)^    {name}\s+[A-Z]")
        self.assertIn("PYTHON_POPCONTEST_STATSD_HOST", said)

    def test_help_says_what_is_sent_and_how_to_clean_up(self) -> None:
        self.assertIn("Nothing is sent.", self.popcon("run -h").stdout)
        said = " ".join(self.popcon("uninstall -h").stdout.split())
        self.assertIn("`pip uninstall popcon` leaves them", said)
        self.assertIn("python popcon.py uninstall", said)

    def test_nobodys_own_module_is_run_by_a_command(self) -> None:
        for name in (
            "argparse",
            "json",
            "re",
            "subprocess",
            "socket",
            "compileall",
            "wave",
        ):
            (self.lone / f"{name}.py").write_text("print('mine'); raise SystemExit(3)")
        for start in ("popcon.py", "-m popcon"):
            for line in (
                "uninstall",
                "run --explain -c ''",
                "selftest --metrics nowhere",
            ):
                ended = self.popcon(line, start)
                self.assertNotIn("mine", ended.stdout)
                self.assertEqual(ended.stderr.count("mine"), 0, ended.stderr)
                self.assertNotEqual(ended.returncode, 3)
        (self.lone / "mine.py").write_text("import wave")
        self.assertEqual(self.popcon("run mine.py").stdout, "mine\n")

    def test_nobody_reads_what_is_printed(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as pipe:
            for line, settings in [
                ("uninstall", {}),
                ("selftest", {"PYTHONUNBUFFERED": "1"}),
            ]:
                ended = self.popcon_with({"stdout": pipe}, line, **settings)
                self.assertEqual((ended.returncode, ended.stderr), (2, ""))

    def test_a_full_disk_takes_nothing_that_is_printed(self) -> None:
        with open("/dev/full", "wb") as full:
            ended = self.popcon_with({"stdout": full}, "uninstall")
        self.assertEqual(ended.returncode, 2)
        self.assertRegex(ended.stderr, r"\Apopcon: .*No space left on device\n\Z")

    def test_stdout_is_closed(self) -> None:
        command = shlex.join([sys.executable, "popcon.py", "uninstall"])
        ended = subprocess.run(["sh", "-c", f"{command} >&-"], cwd=self.lone, env={})
        self.assertEqual(ended.returncode, 0)

    def test_what_was_printed_before_a_failure_is_not_lost(self) -> None:
        def fail(_: object) -> int:
            print("wrote one")
            raise OSError("you may not write in two")

        out = io.TextIOWrapper(io.BytesIO())
        with (
            mock.patch.object(popcon, "uninstall", fail),
            mock.patch.object(sys, "stdout", out),
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            fail.__name__ = "uninstall"
            self.assertEqual(popcon.main(["uninstall"]), 2)
        out.seek(0)
        self.assertEqual(out.read(), "wrote one\n")
        self.assertEqual(err.getvalue(), "popcon: you may not write in two\n")

    def test_ctrl_c_ends_with_130_and_no_traceback(self) -> None:
        with mock.patch.object(popcon, "check_files", side_effect=KeyboardInterrupt):
            self.assertEqual(popcon.main(["selftest"]), 130)

    def test_a_shell_that_is_told_to_run_it_changes_nothing_and_says_why(self) -> None:
        traps = self.folder / "traps"
        for name in ("python", "python3", "import", "from", "popcon"):
            self.write(traps, {name: f"#!/bin/sh\ntouch '{self.lone}/trapped'\n"})
            (traps / name).chmod(0o755)
        for shell in SHELLS:
            command = [shell, "popcon.py"]
            if shell.endswith("busybox"):
                command.insert(1, "sh")
            ended = subprocess.run(
                command,
                cwd=self.lone,
                env={"PATH": str(traps)},
                capture_output=True,
                text=True,
            )
            self.assertEqual((ended.returncode, ended.stdout), (2, ""))
            self.assertIn("yntax error", ended.stderr)
            self.assertEqual(os.listdir(self.lone), ["popcon.py"])

    def test_it_runs_as_a_program_and_changes_nothing(self) -> None:
        program = self.lone / "popcon.py"
        program.chmod(0o755)
        path = os.path.dirname(sys.executable)
        ended = subprocess.run(
            [program],
            cwd=self.lone,
            env={"PATH": f"{path}:/bin"},
            capture_output=True,
            text=True,
        )
        self.assertEqual((ended.returncode, ended.stdout), (2, ""))
        self.assertIn("required: COMMAND", ended.stderr)
        self.assertEqual(os.listdir(self.lone), ["popcon.py"])


class TestSelftest(Lone):
    def selftest(self, status: int, *patterns: str, **settings: str) -> str:
        """Return what selftest prints; it ends so, and has lines that match the patterns."""
        ended = self.popcon("selftest", **settings)
        self.assertEqual(ended.returncode, status, ended.stdout)
        for pattern in patterns:
            self.assertRegex(ended.stdout, f"(?m)^{pattern}")
        return ended.stdout

    def test_a_lone_copy_proves_the_whole_way_and_leaves_nothing_behind(self) -> None:
        sent = (
            r"(?m)^ok +reporting .*sent b'python_popcon.library_used.popcon-selftest:1"
        )
        for start in (
            "popcon.py",
            "-I popcon.py",
            "-IS -Werror -Xdev popcon.py",
            "-B -Werror -m popcon",
        ):
            with self.subTest(start=start):
                ended = self.popcon("selftest", start, TMPDIR=str(self.own))
                self.assertEqual(
                    (ended.returncode, ended.stderr), (0, ""), ended.stdout
                )
                self.assertRegex(ended.stdout, sent)
                self.assertRegex(
                    ended.stdout, r"\A((ok      |warning ) .{10} \S.*\n)+\Z"
                )
                self.assertEqual(os.listdir(self.own), [])
                self.assertEqual(os.listdir(self.lone), ["popcon.py"])

    def test_it_says_who_reports(self) -> None:
        processes = "ok +processes +no script reports without `install --all"
        if importlib.util.find_spec("IPython") is None:
            processes = "warning +processes +nothing reports without `install --all"
        self.selftest(0, processes)

    def test_it_says_which_switches_are_on(self) -> None:
        switch = "PYTHON_POPCONTEST_SIGTERM"
        self.selftest(0, f"ok +switch +{switch} is on", **{switch: "yes"})
        self.assertNotIn("switch", self.selftest(0, **{switch: "0"}))

    def test_each_wrong_setting_is_told_with_what_is_right(self) -> None:
        settings = dict(zip(popcon.SETTINGS, ["a b", "x", "a:b", "2"]))
        out = self.selftest(1, "ok +reporting", **settings)
        wrong = re.findall("(?m)^error +(host|port|prefix|rate) .*: must be ", out)
        self.assertEqual(len(wrong), 4, out)

    def test_what_is_not_set_or_forbidden_sends_nothing(self) -> None:
        not_set = (
            "warning +host +PYTHON_POPCONTEST_STATSD_HOST is not set: nothing is sent"
        )
        opted_out = "warning +opted out +DO_NOT_TRACK is set: nothing is sent"
        self.selftest(0, not_set, opted_out, "ok +reporting", DO_NOT_TRACK="1")

    def unknown_names(self, *names: str) -> list[str]:
        """Return which of these variables are warned of."""
        with mock.patch.dict(os.environ, dict.fromkeys(names, "1"), clear=True):
            rows = [*popcon.check_settings(argparse.Namespace())]
        texts = [text for _, what, text in rows if what == "unknown"]
        return [text.partition(" is no setting: they are ")[0] for text in texts]

    def test_names_that_are_nearly_ours_are_warned_of_with_the_right_ones(self) -> None:
        near = [
            "POPCON_STATSD_PORT",
            "PYTHON_POPCONTEST_PREFIX",
            "PYTHON_POPCONTEST_SIG_TERM",
            "PYTHON_POPCONTEST_STATSD_RATE",
            "PYTHON_POPCON_STATSD_HOST",
            "python_popcontest_debug",
        ]
        self.assertEqual(self.unknown_names(*near), near)
        right = ", ".join([*popcon.SETTINGS, popcon.SIGTERM_SWITCH, popcon.DEBUG_SWITCH])
        row = f"warning +unknown +POPCON_HOST is no setting: they are {right}"
        self.selftest(0, row, POPCON_HOST="x")

    def test_the_settings_themselves_are_not_warned_of(self) -> None:
        others = (
            "PYTHON_POPCONTEST_DEBUG",
            "PYTHON_POPCONTEST_SIGTERM",
            "DO_NOT_TRACK",
            "HOME",
        )
        self.assertEqual(self.unknown_names(*popcon.SETTINGS, *others), [])

    def warns_of_mapping(self, prefix: str) -> bool:
        with mock.patch.dict(os.environ, PYTHON_POPCONTEST_STATSD_PREFIX=prefix):
            rows = [what for _, what, _ in popcon.check_settings(argparse.Namespace())]
        return "mapping" in rows

    def test_a_prefix_that_readmes_mapping_rules_do_not_match_is_warned_of(
        self,
    ) -> None:
        for prefix in ("", "python_popcon.namespace.physics-1.library_used"):
            self.assertFalse(self.warns_of_mapping(prefix), prefix)
        for prefix in (
            "mine.library_used",
            "python_popcon.namespace.a.b.library_used",
            "python_popcon.namespace.library_used",
            "python_popcon",  # as 0.4.1 wanted it
        ):
            self.assertTrue(self.warns_of_mapping(prefix), prefix)

    def test_it_says_what_an_empty_datagram_proves_and_what_not(self) -> None:
        row = "ok +server +localhost, port .* does not refuse .*--prometheus or --metrics shows"
        with Server() as server:
            settings = server.settings | {"PYTHON_POPCONTEST_STATSD_HOST": "localhost"}
            self.selftest(0, row, **settings)
            self.assertEqual(server.received(), [b""])

    def test_a_server_that_is_not_there_is_an_error(self) -> None:
        closed = settings_for(free_port(socket.SOCK_DGRAM))
        self.selftest(1, r"error +server +nobody listens at 127.0.0.1, port [0-9]+$", **closed)
        nowhere = {"PYTHON_POPCONTEST_STATSD_HOST": "nowhere.invalid"}
        self.selftest(1, r"error +server +nothing can be sent to nowhere.invalid, .*: .", **nowhere)

    def test_a_check_that_is_impossible_is_an_error_and_the_next_is_made(self) -> None:
        for place, name, check in [
            (tempfile, "TemporaryDirectory", "processes"),
            (popcon, "Places", "files"),
        ]:
            fails = mock.patch.object(
                place, name, side_effect=FileNotFoundError("no folder")
            )
            with fails, contextlib.redirect_stdout(io.StringIO()) as out:
                self.assertEqual(popcon.main(["selftest"]), 1)
            said = rf"(?m)^error +{check} +no folder\n(.*\n)*ok +port"
            self.assertRegex(out.getvalue(), said)

    def selftest_of_broken(self, line: str, *patterns: str) -> None:
        """Run selftest of a popcon with one more line at its end: reporting fails."""
        end = 'if __name__ == "__main__":\n    sys.exit'
        source = SOURCE.read_text("utf-8").replace(end, f"{line}\n{end}")
        self.write(self.lone, {"popcon.py": source})
        self.selftest(1, *patterns)

    def test_a_popcon_that_reports_wrongly_is_an_error_with_its_reason(self) -> None:
        self.selftest_of_broken(
            "def statsd_line(*_): return b'x'", "error +reporting .*sent b'x'"
        )
        self.selftest_of_broken("setup_reporter = print", "error +reporting .*sent b''")
        broken = "if __name__ != '__main__': raise RuntimeError('broken')"
        self.selftest_of_broken(
            broken, r"error +reporting .*sent b''", "RuntimeError: broken"
        )
        broken = "def send(*_): raise OSError('the cable is cut')"
        reason = "popcon: nothing sent: the cable is cut"
        self.selftest_of_broken(broken, r"error +reporting .*sent b''", reason)


class FakeServers:
    """A statsd server, with what exporter and Prometheus would make of its counts.

    counters: what counters of popcon-selftest there are, and what they have counted
    name: the counter that takes what arrives, as the mapping has it; "" if none does
    """

    def __init__(self, case: Case, name: str, *counters: str) -> None:
        self.counters = dict.fromkeys(counters, 5)
        self.name = name
        self.headers: list[str] = []
        self.statsd = case.open(Server())
        servers = self

        class Handler(BaseHTTPRequestHandler):
            log_message = mock.Mock()

            def do_GET(self) -> None:
                self.reply(self.path.partition("?")[2])

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                self.reply(self.rfile.read(length).decode())

            def reply(self, form: str) -> None:
                servers.headers.append(self.headers.get("X-Key", ""))
                servers.add_up()
                query = dict(urllib.parse.parse_qsl(form)).get("query", "")
                self.send_response(200)
                self.end_headers()
                self.wfile.write(servers.answer(query).encode())

        http = case.open(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=http.serve_forever, args=(0.01,)).start()
        case.addCleanup(http.shutdown)
        self.url = f"http://127.0.0.1:{http.server_port}"

    def add_up(self) -> None:
        for datagram in self.statsd.received():
            if self.name and b"popcon-selftest" in datagram:
                self.counters[self.name] = self.counters.get(self.name, 0) + 1

    def answer(self, query: str) -> str:
        """Return the exporter's metrics, or what Prometheus answers to a query."""
        if not query:
            lines = [f"# TYPE {COUNTER} counter", f"# TYPE {UNMAPPED} counter"]
            lines.append("process_start_time_seconds 1")
            lines += [f"{name} {value}" for name, value in self.counters.items()]
            return "\n".join(lines) + "\n"
        result = []
        for name, value in self.counters.items():
            if ("library=" in query) == (name == MAPPED):
                labels = {"__name__": name.partition("{")[0]}
                if name == MAPPED:
                    labels["library"] = "popcon-selftest"
                samples = [[1e9, str(value)], [1e9 + 1, "NaN"]]
                result.append({"metric": labels, "values": samples})
        return json.dumps({"status": "success", "data": {"result": result}})


MAPPED = 'python_popcon_library_used{library="popcon-selftest"}'
UNMAPPED = "python_popcon_library_used_popcon_selftest"


class TestChain(Lone):
    """From a setting to Prometheus, with fake servers and with real ones."""

    def check(self, settings: dict[str, str], **options: str) -> tuple[str, str]:
        """Return the state and the text of selftest's row, without a long wait."""
        arguments = ["selftest"]
        for name, value in options.items():
            arguments += [f"--{name}", value]
        given = popcon.command_line().parse_args(arguments)
        with (
            mock.patch.dict(os.environ, settings, clear=True),
            mock.patch.object(popcon, "patience_with", return_value=0.0),
        ):
            ((state, what, text),) = popcon.findings(popcon.check_chain, given)
        self.assertEqual(what, "chain")
        return state, text

    def check_both(
        self, name: str, *counters: str, said: str, state: str = "error"
    ) -> None:
        """Ask the metrics, then Prometheus, of fake servers; both rows match."""
        for option, path in (("metrics", "/metrics"), ("prometheus", "/")):
            servers = FakeServers(self, name, *counters)
            row = self.check(servers.statsd.settings, **{option: servers.url + path})
            self.assertEqual(row[0], state, row[1])
            self.assertRegex(row[1], said)

    def test_without_a_server_to_ask_there_is_no_row(self) -> None:
        self.assertEqual(
            [*popcon.check_chain(argparse.Namespace(prometheus="", metrics=""))], []
        )

    def test_a_count_that_arrives_is_ok_be_the_counter_new_or_not(self) -> None:
        said = "one count arrived at http"
        self.check_both(MAPPED, said=said, state="ok")
        self.check_both(MAPPED, MAPPED, said=said, state="ok")

    def test_a_mapping_that_does_not_know_the_prefix_is_named(self) -> None:
        said = f"one count arrived as {UNMAPPED}: the mapping does not know the prefix"
        self.check_both(UNMAPPED, said=said)
        self.check_both(UNMAPPED, MAPPED, UNMAPPED, said=said)

    def test_a_server_that_has_just_begun_finds_both_and_tells_the_right_one(
        self,
    ) -> None:
        servers = FakeServers(self, MAPPED)
        begin = servers.add_up

        def scrape_first() -> None:
            begin()
            if servers.counters:
                servers.counters = {UNMAPPED: 1, **servers.counters}

        servers.add_up = scrape_first  # type: ignore[method-assign]
        row = self.check(servers.statsd.settings, metrics=f"{servers.url}/metrics")
        self.assertEqual(row[0], "ok", row[1])

    def test_a_counter_that_is_not_there_or_does_not_rise_is_told(self) -> None:
        arrive = "do datagrams arrive at 127.0.0.1, port [0-9]+"
        self.check_both(
            "", said=f"knows no such counter: {arrive}"
        )
        self.check_both(
            "", MAPPED, said=f"knows the counter, but it did not rise: {arrive}"
        )
        self.check_both("", UNMAPPED, said="knows no such counter")

    def test_nobody_listens(self) -> None:
        servers = FakeServers(self, MAPPED)
        port = free_port(socket.SOCK_DGRAM)
        row = self.check(settings_for(port), prometheus=servers.url)
        self.assertEqual(row[0], "error")
        said = rf"nobody listens at 127\.0\.0\.1, port {port}$"
        self.assertRegex(row[1], said)

    def test_a_broken_link_is_one_error(self) -> None:
        closed = settings_for(free_port(socket.SOCK_DGRAM))
        (self.lone / "counts.prom").touch()
        ended = self.popcon("selftest --metrics counts.prom", **closed)
        self.assertEqual(ended.returncode, 1)
        self.assertEqual(re.findall("(?m)^error +([a-z]+)", ended.stdout), ["chain"])

    def test_what_is_forbidden_or_not_set_is_not_sent(self) -> None:
        servers = FakeServers(self, MAPPED)
        opted_out = servers.statsd.settings | {"DO_NOT_TRACK": "1"}
        for settings, said in [
            ({}, "PYTHON_POPCONTEST_STATSD_HOST is not set: nothing is sent"),
            (opted_out, "DO_NOT_TRACK is set: nothing is sent"),
        ]:
            row = self.check(settings, prometheus=servers.url)
            self.assertEqual(row, ("error", said))
        self.assertEqual(servers.statsd.received(), [])

    def test_the_settings_in_force_are_used_for_the_count(self) -> None:
        servers = FakeServers(self, MAPPED)
        settings = servers.statsd.settings | {
            "PYTHON_POPCONTEST_STATSD_PREFIX": "x",
            "PYTHON_POPCONTEST_STATSD_SAMPLE_RATE": "0.5",
        }
        with mock.patch.object(FakeServers, "add_up"):
            self.check(settings, metrics=f"{servers.url}/metrics")
        self.assertEqual(servers.statsd.received(), [b"x.popcon-selftest:1|c|@0.5"])

    def test_a_server_that_cannot_be_asked_is_an_error(self) -> None:
        with Server() as statsd:
            url = f"http://127.0.0.1:{free_port()}"
            row = self.check(statsd.settings, prometheus=url)
            self.assertRegex(row[1], "cannot be read: .*refused")
            row = self.check(statsd.settings, metrics=str(self.folder / "nothing"))
            self.assertRegex(row[1], "No such file")
            servers = FakeServers(self, MAPPED)
            for answer in (
                "<html>",
                "[1]",
                '{"data": null}',
                '{"data": {"result": [{}]}}',
            ):
                with mock.patch.object(FakeServers, "answer", return_value=answer):
                    row = self.check(statsd.settings, prometheus=servers.url)
                self.assertRegex(
                    row[1], "/api/v1/query does not answer as Prometheus does"
                )
            self.assertEqual(statsd.received(), [])

    def test_headers_are_sent(self) -> None:
        servers = FakeServers(self, MAPPED)
        given = {"prometheus": servers.url, "header": "X-Key: hunter2"}
        self.assertEqual(self.check(servers.statsd.settings, **given)[0], "ok")
        self.assertEqual(set(servers.headers), {"hunter2"})

    def test_it_waits_for_three_scrapes_if_it_knows_how_often(self) -> None:
        every_minute = [(60.0 * n, 1.0) for n in range(5)]
        after_a_pause = [*every_minute, (5000.0, 1.0), (5060.0, 1.0)]
        self.assertEqual(popcon.patience_with({}), 180)
        self.assertEqual(popcon.patience_with({MAPPED: every_minute[:1]}), 180)
        self.assertEqual(popcon.patience_with({MAPPED: after_a_pause}), 180)
        hourly = [(0.0, 1.0), (3600.0, 1.0)]
        self.assertEqual(popcon.patience_with({MAPPED: hourly}), 10800)
        self.assertEqual(popcon.patience_with({UNMAPPED: hourly}), 180)
        each_second = [(0.0, 1.0), (1.0, 1.0)]
        self.assertEqual(popcon.patience_with({MAPPED: each_second}), 30)

    def test_on_a_terminal_it_says_what_it_waits_for(self) -> None:
        servers = FakeServers(self, MAPPED)
        terminal = io.StringIO()
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        with contextlib.redirect_stderr(terminal):
            self.check(servers.statsd.settings, prometheus=servers.url)
        said = f"popcon: waiting for one count more at {servers.url}, up to 0 s\n"
        self.assertEqual(terminal.getvalue(), said)
        with contextlib.redirect_stderr(io.StringIO()) as pipe:
            self.check(servers.statsd.settings, prometheus=servers.url)
        self.assertEqual(pipe.getvalue(), "")

    @unittest.skipUnless(EXPORTER, "needs POPCON_TEST_STATSD_EXPORTER")
    def test_the_real_exporter(self) -> None:
        settings, metrics = self.open(self.exporter())
        url = f"http://127.0.0.1:{metrics.place[1]}/metrics"
        wait = mock.patch.object(popcon, "patience_with", return_value=10.0)
        given = popcon.command_line().parse_args(["selftest", "--metrics", url])
        with mock.patch.dict(os.environ, settings), wait:
            for _ in range(2):
                self.assertEqual(
                    [row[:2] for row in popcon.check_chain(given)], [("ok", "chain")]
                )
            os.environ["PYTHON_POPCONTEST_STATSD_PREFIX"] = "mine.library_used"
            for _ in range(2):
                ((state, _, text),) = popcon.check_chain(given)
                self.assertEqual(state, "error")
                self.assertRegex(
                    text, "as mine_library_used_popcon_selftest: the mapping does not"
                )

    def real_prometheus(self, path: str, exporter_port: int) -> str:
        """Start a server that scrapes the exporter each second, and return its address."""
        target = {"targets": [f"127.0.0.1:{exporter_port}"]}
        job = {
            "job_name": "popcon",
            "scrape_interval": "1s",
            "static_configs": [target],
        }
        self.write(self.folder, {"scrape.yml": json.dumps({"scrape_configs": [job]})})
        address = f"127.0.0.1:{free_port()}"
        data = self.folder / f"data-{free_port()}"
        names = ["config.file", "storage.tsdb.path", "web.listen-address"]
        if "victoria" in path:
            names = ["promscrape.config", "storageDataPath", "httpListenAddr"]
        values = [self.folder / "scrape.yml", data, address]
        self.start(path, *[f"--{name}={value}" for name, value in zip(names, values)])
        url = f"http://{address}"
        self.wait_until(
            lambda: urllib.request.urlopen(f"{url}/api/v1/query?query=up", timeout=5)
        )
        return url

    @unittest.skipUnless(
        EXPORTER and REAL_SERVERS, "needs POPCON_TEST_STATSD_EXPORTER and servers"
    )
    def test_real_servers(self) -> None:
        settings, metrics = self.open(self.exporter())
        unscraped, _ = self.open(self.exporter())
        for path in REAL_SERVERS:
            with self.subTest(server=path):
                url = self.real_prometheus(path, metrics.place[1])
                line = f"selftest --prometheus {url}"
                ended = self.popcon(line, **settings)
                self.assertEqual(ended.returncode, 0, ended.stdout)
                self.assertRegex(ended.stdout, "(?m)^ok +chain +one count arrived")
                mine = {"PYTHON_POPCONTEST_STATSD_PREFIX": "mine.library_used"}
                ended = self.popcon(line, **settings | mine)
                self.assertEqual(ended.returncode, 1, ended.stdout)
                self.assertRegex(
                    ended.stdout, "(?m)^error +chain .*the mapping does not know"
                )
                row = self.check(unscraped, prometheus=url)
                self.assertRegex(row[1], "knows the counter, but it did not rise")


class TestRun(Case):
    def setUp(self) -> None:
        super().setUp()
        self.install("alpha", "alpha.py")

    def run_it(
        self, *arguments: str, **settings: Any
    ) -> subprocess.CompletedProcess[str]:
        return self.run_python(str(SOURCE), arguments=["run", *arguments], **settings)

    def assert_same(self, *arguments: str, said: str = f"{ALPHA}\n") -> None:
        """Python ends as `popcon run` does, but that the latter says something at the end."""
        with self.subTest(arguments=arguments), Server() as server:
            path = os.pathsep.join([str(self.site), str(HERE)])
            options: Any = {"env": clean_environ(PYTHONPATH=path, **server.settings)}
            options |= {
                "cwd": self.own,
                "input": "text",
                "text": True,
                "capture_output": True,
            }
            plain = subprocess.run([sys.executable, *arguments], **options)
            ours = subprocess.run(
                [sys.executable, "-m", "popcon", "run", *arguments], **options
            )
            # -m shows frames of runpy. From 3.13 on, -c shows the line of code as well.
            frames = (
                r'(?m)^  File "<frozen runpy>.*\n|^  File .*runpy.py", .*\n(    .*\n)?'
            )
            lines = r'(?m)(^  File "<string>", .*\n)(    .*\n)+'
            expected = re.sub(lines, r"\1", re.sub(frames, "", plain.stderr))
            found = re.sub(frames, "", ours.stderr)
            self.assertEqual(
                (ours.returncode, ours.stdout), (plain.returncode % 256, plain.stdout)
            )
            self.assertEqual(found, expected + said)
            self.assertEqual(server.received(), [])

    def test_two_hyphens_are_an_argument_of_the_program(self) -> None:
        program = "import alpha, os, sys; print(os.path.basename(sys.argv[0]), sys.argv[1:])"
        self.write(self.own, {"show.py": program})
        arguments = ("--", "x", "--", "-m", "y")
        self.assert_same("-m", "show", *arguments)
        self.assert_same("-c", program, *arguments)
        self.assert_same("show.py", *arguments)

    def test_every_form_of_program_ends_as_with_python(self) -> None:
        program = textwrap.dedent("""\
            import os, sys, alpha
            number: int = 1
            sys.argv[0] = os.path.abspath(sys.argv[0])
            print(sys.argv, sys.path, __name__, __doc__, vars().get("__file__"), sep="\\n")
            print(sys.modules["__main__"].__dict__ is globals(), sys.stdin.read(), flush=True)
            def fail(cause=None):
                raise ValueError("mine") from cause
            def chain():
                try: fail()
                except ValueError as error: fail(error)
            eval(sys.argv[-1])
            """)
        names = ("main.py", "mod.py", "package/__main__.py", "package/__init__.py")
        self.write(self.own, dict.fromkeys(names, program))
        self.write(self.own, {"package/__init__.py": ""})
        arguments = ("-m", "a b", "--explain", "-h")
        for form in (
            ["main.py"],
            [str(self.own / "main.py")],
            ["-m", "mod"],
            ["-m", "package"],
            ["-c", program],
        ):
            self.assert_same(*form, *arguments, "fail()")
        for ending in (
            "sys.exit()",
            "sys.exit(7)",
            "sys.exit('words')",
            "sys.exit((1, 2))",
        ):
            self.assert_same("main.py", *arguments, ending)
        self.assert_same("main.py", *arguments, "chain()")
        self.assert_same("main.py", "os._exit(3)", said="")

    def test_programs_of_all_kinds(self) -> None:
        hook = (
            "import alpha, sys\nsys.excepthook = lambda *e: print(e[2].tb_lineno)\n1/0"
        )
        workers = """
            import concurrent.futures as c, multiprocessing as m, alpha
            def work(n): print(n * 2, flush=True)
            if __name__ == '__main__':
                c.ProcessPoolExecutor(mp_context=m.get_context('spawn')).submit(work, 21)
            """
        programs = {
            "hook.py": hook,
            "late.py": "import atexit\natexit.register(lambda: __import__('alpha'))\n",
            "coded.py": "# coding: latin-1\nimport alpha\nprint(ascii('\u00c3\u00a9'))\n",
            "workers.py": textwrap.dedent(workers),
            "fork.py": "import alpha, os, sys\nif os.fork(): os.wait()\n",
            "without_a_suffix": "import alpha\n",
        }
        self.write(self.own, programs)
        for name in programs:
            self.assert_same(name)
        self.assert_same("-c", "import sys; sys.stderr = None", said="")
        self.assert_same("-c", "import sys; sys.stdout.close()", said=f"{NOTHING}\n")

    def test_what_is_no_python_program_gets_one_sentence(self) -> None:
        notebook = '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
        self.write(
            self.own, {"x.ipynb": notebook, "x.sh": "for x in *; do echo $x; done\n"}
        )
        (self.own / "binary").write_bytes(b"\x7fELF\0\0\xff")
        self.write(self.own, {"syntax.py": "import alpha\n  wrong(\n"})
        for name, said in {
            "x.ipynb": r"\S+/x\.ipynb: run what `jupyter nbconvert --to script`",
            "x.sh": r"\S+/x\.sh is no Python program: invalid syntax",
            "syntax.py": r"\S+/syntax\.py is no Python program: .*\(syntax\.py, line 2\)",
            "binary": r"\S+/binary is no Python program: ",
            "nowhere.py": ".*No such file or directory: 'nowhere.py'",
            ".": r".*Is a directory: '\.'",
        }.items():
            ended = self.run_it(name)
            self.assertEqual((ended.returncode, ended.stdout), (2, ""))
            self.assertRegex(ended.stderr, rf"\Apopcon: {said}.*\n\Z")

    def test_no_frame_of_popcons_is_shown(self) -> None:
        ended = self.run_it("-m", "nowhere")
        self.assertRegex(ended.stderr, rf"\n\w+Error: .*nowhere.*\n{NOTHING}\n\Z")
        self.assertNotIn("popcon.py", ended.stderr)
        self.assertEqual(ended.returncode, 1)

    def test_ctrl_c_ends_a_program_with_130_and_the_conclusion(self) -> None:
        ended = self.run_it("-c", "import alpha; raise KeyboardInterrupt")
        self.assertEqual((ended.returncode, ended.stderr), (130, f"{ALPHA}\n"))

    def assert_concludes(self, conclusion: str, code: str, **settings: str) -> None:
        """The program's last line on stderr is this, with --explain and without."""
        for options in ([], ["--explain"]):
            ended = self.run_it(*options, "-c", code, **settings)
            self.assertEqual(ended.returncode, 0)
            self.assertIn(conclusion, ended.stderr.splitlines()[-1])

    def test_it_always_ends_with_a_conclusion(self) -> None:
        prefix = {"PYTHON_POPCONTEST_STATSD_PREFIX": "x"}
        rate = {"PYTHON_POPCONTEST_STATSD_SAMPLE_RATE": ".5"}
        wrong = {"PYTHON_POPCONTEST_STATSD_PREFIX": "a b"}
        self.assert_concludes(NOTHING, "")
        self.assert_concludes(NOTHING, "import json")
        self.assert_concludes(ALPHA, "import alpha", DO_NOT_TRACK="0")
        self.assert_concludes("x.alpha:1|c|@.5", "import alpha", **prefix, **rate)
        start = "popcon: nothing would be sent: "
        self.assert_concludes(
            f"{start}DO_NOT_TRACK is set", "import alpha", DO_NOT_TRACK="1"
        )
        said = f"{start}PYTHON_POPCONTEST_STATSD_PREFIX='a b': must be"
        self.assert_concludes(said, "import alpha", **wrong)

    def test_popcon_itself_is_not_what_a_program_used_and_sends_nothing(self) -> None:
        shutil.copy(SOURCE, self.site)
        self.install("popcon", record="popcon.py,,\n")
        code = "import popcon; popcon.setup_reporter(); import alpha; popcon.report()"
        for start in (
            str(self.site / "popcon.py"),
            "import sys, popcon; sys.exit(popcon.main())",
        ):
            with Server() as server:
                ended = self.run_python(
                    start, arguments=["run", "-c", code], **server.settings
                )
                self.assertEqual((ended.stderr, server.received()), (f"{ALPHA}\n", []))

    def test_nothing_is_sent_where_each_process_reports(self) -> None:
        set_up = "import popcon; popcon.setup_reporter()"
        self.write(self.site, {"sitecustomize.py": set_up})
        with Server() as server:
            plain = self.run_python("import alpha", **server.settings)
            self.assertEqual((plain.stderr, server.names()), ("", ["alpha"]))
        with Server() as server:
            ended = self.run_it("-c", "import alpha", **server.settings)
            self.assertEqual((ended.stderr, server.received()), (f"{ALPHA}\n", []))

    def test_explain_says_whose_each_module_is_or_why_nobodys(self) -> None:
        self.install("Beta.X", "beta/__init__.py", "beta/more.py", "beta/other.py")
        self.install("sleepy", "sleepy.py")
        self.install("before", "before.py", "late.py")
        self.install(
            "edited", more={"direct_url.json": '{"dir_info": {"editable": true}}'}
        )
        self.write(self.own, {"mine.py": "", "edited.py": ""})
        code = "import beta.more, beta.other, mine, edited, wave, late, sys, importlib.util as u\n"
        code += "sys.modules['sleepy'] = u.module_from_spec(u.find_spec('sleepy'))\n"
        code += "sys.modules[1] = None"
        start = "import sys, before, popcon; sys.exit(popcon.main())"
        ended = self.run_python(start, arguments=["run", "--explain", "-c", code])
        self.assertEqual((ended.returncode, ended.stdout), (0, ""))
        self.assertEqual(ended.stderr, textwrap.dedent(f"""\
            not counted: before: it was loaded before
            beta-x: 3 modules
            not counted: {self.own}/edited.py: of no library, or of an editable install
            not counted: {self.own}/mine.py: of no library, or of an editable install
            not counted: 1: not executed, without a file, or Python's own
            not counted: sleepy: not executed, without a file, or Python's own
            python_popcon.library_used.beta-x:1|c
            """))  # fmt: skip


class TestInstall(Lone):
    def setUp(self) -> None:
        super().setUp()
        self.prefix = self.folder / "env"
        venv.create(self.prefix, symlinks=True)
        (self.purelib,) = self.prefix.glob("lib/python*/site-packages")
        self.library, self.pth = self.purelib / "popcon.py", self.purelib / "popcon.pth"
        self.startup = self.prefix / "etc" / "ipython" / "startup" / "000-popcon.py"
        self.install("alpha", "alpha.py", folder=self.purelib)
        self.before = self.state()

    def run_in_it(self, code: str, *flags: str, **options: Any) -> tuple[int, str, str]:
        """Run the code, or the lone popcon, by the environment's Python, which finds no more."""
        # Permissions are to hold for root, too.
        humbly = (
            ["env"] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override"]
        )
        flags = *humbly[1:], str(self.prefix / "bin" / "python"), *flags
        options = {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": ""} | options
        options |= {
            "python": humbly[0],
            "arguments": options.pop("command", "").split(),
        }
        ended = self.run_python(code or str(self.lone / "popcon.py"), *flags, **options)
        return ended.returncode, ended.stdout, ended.stderr

    def command(self, command: str, code: str = "", **options: Any) -> str:
        """What a command says that ends well."""
        status, out, err = self.run_in_it(code, command=command, **options)
        self.assertEqual((status, err), (0, ""), out)
        return out

    def refused(self, command: str, code: str = "", **options: Any) -> str:
        """What a command says that changes nothing."""
        before = self.state()
        status, out, err = self.run_in_it(code, command=command, **options)
        self.assertEqual((status, out), (2, ""))
        self.assertEqual(self.state(), before)
        return err

    def state(self) -> dict[Path, bytes]:
        """Return all files, and what is in them."""
        paths = self.prefix.rglob("*")
        return {path: path.read_bytes() for path in paths if path.is_file()}

    def files_since(self, before: dict[Path, bytes]) -> set[str]:
        return {str(path) for path in self.state().keys() - before.keys()}

    def reported(self, code: str = "import alpha", **settings: str) -> list[str]:
        """What the code sends in the environment; it says nothing."""
        with Server() as server:
            ended = self.run_in_it(
                code, "-B", "-W", "error", **server.settings | settings
            )
            self.assertEqual(ended, (0, "", ""))
            return server.names()

    def assert_comes_and_goes(self, command: str) -> None:
        """An install tells each file that it writes, and an uninstall removes just these."""
        module = "import runpy; runpy.run_module('popcon', None, '__main__')"  # as -m popcon does
        before = self.state()
        *said, compiled, _next, _check = self.command(command).splitlines()
        self.assertEqual(compiled, f"compiled {self.library}")
        wrote = {line.removeprefix("wrote ") for line in said}
        for level in ("", "1", "2"):  # for python, python -O, python -OO
            path = importlib.util.cache_from_source(self.library, optimization=level)
            wrote.add(path)
        self.assertEqual(wrote, self.files_since(before))
        self.assertEqual(self.pth.exists(), "--all" in command)
        after = self.state()
        self.assertNotIn("wrote", self.command(command))
        self.assertEqual(self.state(), after)
        for flag in ("-O", "-OO"):
            self.run_in_it("import popcon", flag)
        self.assertEqual(self.state(), after)
        self.write(self.purelib, {"__pycache__/popcon.cpython-399.pyc": ""})
        made = self.files_since(before)
        said = self.command("uninstall", module).splitlines()
        self.assertEqual({line.removeprefix("removed ") for line in said}, made)
        self.assertEqual(self.state(), before)

    def test_each_process_loads_popcon_once(self) -> None:
        # In a virtual environment Python runs .pth files twice.
        self.command("install --all-processes")
        _, _, err = self.run_in_it("pass", "-v")
        loaded = re.findall("(?m)^# code object from .*popcon.*", err)
        self.assertEqual(len(loaded), 1, err)

    def test_an_uninstall_leaves_the_environment_as_it_was(self) -> None:
        for command in ("install", "install --all-processes"):
            self.assert_comes_and_goes(command)
        self.write(
            self.purelib, {"__pycache__/other.cpython-399.pyc": "", "popcon_x.py": ""}
        )
        self.write(self.startup.parent, {"500-mine.py": ""})
        for command in ("install", "install --all-processes"):
            self.assert_comes_and_goes(command)
        self.assertIn("nothing to remove", self.command("uninstall"))

    def test_an_uninstall_removes_no_folder(self) -> None:
        self.command("install --all-processes")
        self.command("uninstall")
        self.assertEqual(os.listdir(self.startup.parent), [])
        self.assertEqual(os.listdir(self.purelib / "__pycache__"), [])

    def test_it_says_who_reports_from_now_on_and_what_is_missing(self) -> None:
        host = "PYTHON_POPCONTEST_STATSD_HOST"
        check = "`python -m popcon selftest` shows whether it works."
        session = "each session of IPython and Jupyter"
        for command, who in [
            ("install", session),
            ("install --all-processes", "each process"),
            ("install", "each process"),
        ]:
            said = self.command(command).splitlines()[-2:]
            self.assertEqual(said, [f"Next: {who} reports where {host} is set.", check])

    def test_files_appear_whole_or_not_at_all_and_a_cut_short_install_is_completed(
        self,
    ) -> None:
        """It dies before each of its changes; so does an uninstall."""
        code = """
            import os, sys, popcon
            changes = "os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir"
            left = [None] * int(sys.argv.pop())
            def die(event, arguments):
                is_made = event == "open" and arguments[2] & os.O_CREAT
                if is_made and str(arguments[0]).endswith((".py", ".pth")):
                    os._exit(8)
                if is_made or event in changes:
                    left.pop() if left else os._exit(9)
            sys.addaudithook(die)
            popcon.main()
            """
        self.startup.parent.mkdir(parents=True)
        (self.purelib / "__pycache__").mkdir()
        before = self.state().keys()
        self.command("install --all-processes")
        whole = {
            path: path.read_bytes() for path in (self.library, self.startup, self.pth)
        }
        states = {"install --all-processes": self.state().keys(), "uninstall": before}
        for command, other in zip(states, reversed(states)):
            for at in range(99):
                self.command(other)
                self.assertEqual(self.state().keys(), states[other], at)
                status = self.run_in_it(code, command=f"{command} {at}", cwd=self.lone)[
                    0
                ]
                self.assertIn(status, (0, 9))
                found = {path: path.read_bytes() for path in whole if path.exists()}
                self.assertLessEqual(found.items(), whole.items())
                if not status:
                    break
            self.assertGreater(at, 3)

    def test_installs_at_the_same_moment_do_no_harm_and_upgrade_another_version(
        self,
    ) -> None:
        self.startup.parent.mkdir(parents=True)
        before = self.state()
        for _ in range(2):
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(self.command, ["install --all-processes"] * 4))
            self.assertNotIn("wrote", self.command("install --all-processes"))
            for path in (self.library, self.pth, self.startup):
                path.write_text(path.read_text("utf-8") + "# older\n", "utf-8")
        self.assertEqual(self.command("install --all-processes").count("wrote"), 3)
        self.command("uninstall")
        self.assertEqual(self.state(), before)

    def test_what_is_somebody_elses_is_called_that_and_left(self) -> None:
        for path, text in [
            (self.library, "x = 1\n"),
            (self.library, "half a file ("),
            (self.purelib / "popcon" / "__init__.py", "x = 1\n"),
            (self.pth, "import sys\n"),
            (self.startup, "mine = 1\n"),
        ]:
            self.write(path.parent, {path.name: text})
            before = self.state()
            why = f"popcon: {path} is in the way: it is not popcon's; nothing was changed\n"
            self.assertEqual(self.refused("install --all-processes"), why)
            self.command("uninstall")
            self.assertEqual(self.state(), before)
            path.unlink()

    def test_each_process_reports_once_and_a_persons_own_popcon_is_left_alone(
        self,
    ) -> None:
        session = f"import runpy; runpy.run_path({str(self.startup)!r}); import alpha"
        self.command("install")
        self.assertEqual(self.reported(session), ["alpha"])
        self.assertEqual(self.reported(), [])
        elsewhere = self.folder / "elsewhere"
        for folder, path in ((elsewhere, str(elsewhere)), (self.own, "")):
            self.write(folder, {"popcon.py": "raise SystemExit('run')"})
            self.assertEqual(self.reported(session, PYTHONPATH=path), ["alpha"])
        self.command("install --all-processes")
        self.assertEqual(self.reported(), ["alpha"])
        self.assertEqual(self.reported(session), ["alpha"])
        self.assertEqual(self.reported(PYTHONPATH=str(elsewhere)), ["alpha"])
        self.write(elsewhere, {"popcon.pth": ""})
        self.assertEqual(self.reported(PYTHONPATH=str(elsewhere)), ["alpha"])

    def test_popcon_is_found_behind_folders_of_other_pth_files(self) -> None:
        self.command("install --all-processes")
        self.write(self.purelib, {"__editable__.pth": f"{self.own}\n"})
        self.assertEqual(self.reported(), ["alpha"])

    def test_a_person_can_import_another_module_called_popcon(self) -> None:
        folder = self.folder / "later on the path"
        self.write(folder, {"popcon.py": "mine = 1"})
        session = f"import runpy; runpy.run_path({str(self.startup)!r})\n"
        code = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        code += "import alpha, popcon; popcon.mine"
        self.command("install")
        self.assertEqual(self.reported(session + code), ["alpha"])
        self.command("install --all-processes")
        self.assertEqual(self.reported(code), ["alpha"])

    def test_activation_is_silent_whatever_popcon_is_and_leaves_no_name(self) -> None:
        self.command("install --all-processes")
        code = "import runpy, sys; print([x for x in runpy.run_path(sys.argv[1]) if x[:2] != '__'])"
        for source in (
            SOURCE.read_text("utf-8"),
            None,
            "half a file (",
            "raise RuntimeError",
            "",
        ):
            self.library.unlink() if source is None else self.library.write_text(
                source, "utf-8"
            )
            for flags in ([], ["-S"]):
                ended = self.run_in_it(
                    code, "-Werror", *flags, command=str(self.startup)
                )
                self.assertEqual(ended, (0, "[]\n", ""))

    @unittest.skipUnless(OLD_PYTHONS, "needs POPCON_TEST_OLD_PYTHONS")
    def test_older_pythons_are_told_in_a_sentence_and_by_start_up_files_nothing(
        self,
    ) -> None:
        self.command("install --all-processes")
        for python in OLD_PYTHONS:
            start_up = self.startup.read_text(), self.pth.read_text()
            for text in (readme_block("python", "try:"), *start_up):
                self.write(self.lone, {"sitecustomize.py": text})
                ended = self.run_python(
                    "print(1)", python=python, PYTHONPATH=str(self.lone)
                )
                self.assertEqual((ended.stdout, ended.stderr), ("1\n", ""))
            if "/2.7" not in python:
                ended = self.run_python(str(SOURCE), python=python)
                self.assertRegex(ended.stderr, r"\Apopcon needs Python 3.10 .*\n\Z")

    def test_readmes_lines_in_sitecustomize_report_and_are_silent_without_popcon(
        self,
    ) -> None:
        self.write(self.lone, {"sitecustomize.py": readme_block("python", "try:")})
        self.assertEqual(self.reported(PYTHONPATH=str(self.lone)), ["alpha"])
        (self.lone / "popcon.py").unlink()
        self.assertEqual(self.reported(PYTHONPATH=str(self.lone)), [])

    def test_who_uses_the_environment_can_read_what_was_written(self) -> None:
        self.addCleanup(os.umask, os.umask(0o077))
        self.command("install --all-processes")
        made = self.prefix.rglob("*popcon*")
        modes = sorted(stat.filemode(path.stat().st_mode) for path in made)
        self.assertEqual(modes, ["-rw-r--r--"] * 6)
        for folder in (self.startup.parent, self.purelib / "__pycache__"):
            self.assertEqual(stat.filemode(folder.stat().st_mode), "drwxr-xr-x")

    def test_who_may_not_write_is_told_where(self) -> None:
        not_here = rf"\Apopcon: you may not write in {self.prefix}/\S+\n\Z"
        not_there = rf"\Apopcon: you may not remove {self.prefix}/\S+\n\Z"
        commands = {"install --all-processes": not_here, "uninstall": not_there}
        for command, said in commands.items():
            subprocess.check_call(["chmod", "-R", "a-w", self.prefix])
            self.assertRegex(self.refused(command), said)
            subprocess.check_call(["chmod", "-R", "u+w", self.prefix])
            self.command(command)

    def test_an_uninstall_that_fails_says_what_it_has_removed(self) -> None:
        self.command("install --all-processes")
        self.purelib.chmod(0o555)
        self.addCleanup(self.purelib.chmod, 0o755)
        status, out, err = self.run_in_it("", command="uninstall")
        self.assertEqual(out, f"removed {self.startup}\n")
        self.assertEqual((status, err), (2, f"popcon: you may not remove {self.pth}\n"))
        self.pth.chmod(0o755)
        self.purelib.chmod(0o755)
        self.pth.unlink()
        self.pth.mkdir()  # which is no file of popcon's, so it is left
        said = self.command("uninstall").splitlines()
        self.assertEqual(said[0], f"left {self.pth}: it is not popcon's")
        self.assertIn(f"removed {self.library}", said)

    def test_a_file_where_a_folder_belongs_is_told_in_a_sentence(self) -> None:
        (self.prefix / "etc").write_text("a file where a folder belongs")
        status, _, err = self.run_in_it("", command="install")
        self.assertEqual(status, 2)
        self.assertRegex(
            err, r"\Apopcon: \S+/000-popcon.py cannot be written: Not a directory\n\Z"
        )

    def test_a_folder_with_letters_that_the_encoding_does_not_hold_and_brackets(
        self,
    ) -> None:
        self.prefix = self.prefix.rename(self.folder / "[x]\u00f6")
        for command in ("install", "selftest", "uninstall"):
            self.assertIn("\\xf6/", self.command(command, PYTHONIOENCODING="ascii"))
        self.assertEqual([*self.prefix.rglob("*popcon*")], [])

    def test_selftest_sees_whether_popcon_is_there_and_its_bytecode(self) -> None:
        self.assertRegex(
            self.command("selftest"), r"\nwarning +import .*popcon.py is not there"
        )
        shutil.copy(SOURCE, self.purelib)
        self.purelib.chmod(0o555)
        self.assertRegex(
            self.command("selftest"), r"\nwarning +bytecode +no: each start compiles"
        )
        self.purelib.chmod(0o755)
        self.assertRegex(self.command("selftest"), r"\nok +bytecode .*popcon\.py\n")
        self.assertTrue([*self.purelib.glob("__pycache__/popcon.*.pyc")])

    def test_selftest_sees_a_popcon_that_is_somebody_elses(self) -> None:
        self.library.write_text("x = 1\n")
        row = rf"\nerror +import +{self.library} is not popcon's, and hides it\n"
        status, out, _ = self.run_in_it("", command="selftest")
        self.assertEqual(status, 1)
        self.assertRegex(out, row)

    def test_selftest_sees_what_is_on(self) -> None:
        self.command("install --all-processes")
        said = self.command("selftest")
        self.assertRegex(said, r"\nok +processes +each Python process reports\n")
        self.library.unlink()
        said = self.command("selftest")
        self.assertRegex(said, r"\nwarning +processes +nothing reports without")

    def test_from_python_3_18_on_a_start_file_activates(self) -> None:
        with mock.patch.object(sys, "version_info", (3, 18)):
            places = popcon.Places()
        self.assertEqual(os.path.basename(places.process), "popcon.start")
        if sys.version_info >= (3, 15):
            code = "import sys, sysconfig, popcon; sysconfig.get_paths(); "
            code += "sys.version_info = 3, 18; popcon.main()"
            self.command("install --all-processes", code, cwd=self.lone)
            self.assertFalse(self.pth.exists())
            self.assertEqual(self.reported(), ["alpha"])

    def install_by_pip(self) -> Path:
        shutil.copy(SOURCE, self.purelib)
        return self.install("popcon", folder=self.purelib, record="popcon.py,,\n")

    def test_what_pip_installed_is_used_and_left(self) -> None:
        self.install_by_pip()
        installed = self.state()
        its = str(self.library)
        self.command("install --all-processes", its)
        self.assertEqual(self.reported(), ["alpha"])
        said = self.command("uninstall", its)
        why = "it was installed by pip, so `pip uninstall popcon` removes it"
        self.assertIn(f"left {its}: {why}\n", said)
        shutil.rmtree(self.purelib / "__pycache__")  # which pip removes
        self.assertEqual(self.state(), installed)
        self.write(self.lone, {"popcon.py": SOURCE.read_text("utf-8") + "# newer\n"})
        self.assertIn("in the way: it was installed by pip", self.refused("install"))

    def test_what_pip_left_is_silent_and_removed_by_any_copy(self) -> None:
        info = self.install_by_pip()
        self.command("install --all-processes", str(self.library))
        self.run_in_it("import popcon")  # which leaves bytecode
        self.library.unlink()
        shutil.rmtree(info)  # as pip does
        shutil.rmtree(self.purelib / "__pycache__")
        self.assertEqual(self.reported(), [])
        self.command("uninstall")
        self.assertEqual([*self.prefix.rglob("*popcon*")], [])

    def test_the_working_folder_and_pythonpath_do_not_mislead_install(self) -> None:
        for path in (f"/nowhere{os.pathsep}", str(self.lone)):
            self.command("install", cwd=self.lone, PYTHONPATH=path)
            self.assertTrue(self.library.exists())
            self.command("uninstall")

    def main_with_site_packages(self, folder: Path) -> str:
        """Code that runs a command where this is the folder of installed libraries."""
        code = "import site, sys, popcon; site.getsitepackages = lambda: [{!r}]; "
        return code.format(str(folder)) + "sys.exit(popcon.main())"

    def test_site_packages_with_two_names_are_one(self) -> None:
        link = self.folder / "lib64"  # as on Fedora
        link.symlink_to(self.purelib)
        code = self.main_with_site_packages(link)
        for command in ("install --all-processes", "install", "uninstall"):
            self.command(command, code, cwd=self.lone)
        self.assertEqual(self.state(), self.before)

    def test_popcon_of_another_folder_is_left(self) -> None:
        code = self.main_with_site_packages(self.site)
        other = self.site / "popcon.py"
        shutil.copy(SOURCE, other)
        self.command("install", code, cwd=self.lone)
        self.assertTrue(self.library.exists())
        self.command("uninstall", code, cwd=self.lone)
        self.assertEqual((other.exists(), self.state()), (True, self.before))

    @unittest.skipUnless(JUPYTER, "needs POPCON_TEST_JUPYTER, a python with IPython")
    def test_kernels_where_all_processes_report_count_no_shell_and_selftest_sees_it(
        self,
    ) -> None:
        place = "import ipykernel; print(ipykernel.__path__[0] + '/..')"
        (self.purelib / "jupyter.pth").write_bytes(
            subprocess.check_output([JUPYTER, "-c", place])
        )
        self.write(self.own, {"popcon.py": "raise SystemExit('run')"})
        self.assertRegex(
            self.command("selftest"), r"\nwarning +IPython +no session reports"
        )
        self.command("install")
        on = r"\nok +processes +no script.*\nok +IPython +each session of .* reports\n"
        self.assertRegex(self.command("selftest"), on)
        self.command("install --all-processes")
        kernel = kernel_code("1/0", "import alpha; print(dir())", end="kill")
        own = dict.fromkeys(SHELLS_FOLDERS, str(self.own))
        with Server() as server:
            status, out, err = self.run_in_it(
                kernel, "-W", "ignore", **server.settings | own
            )
            self.assertEqual((status, "popcon" in out), (0, False), out + err)
            datagrams = server.received(0.5)
        # The first is the kernel's; its driver is a process, and reports what it used itself.
        self.assertEqual(datagrams[0], ALPHA.encode())
        self.assertIn(b"jupyter-client", b"".join(datagrams[1:]))


class TestCollect(Lone):
    """The file of counts by itself, then the command as a process."""

    def setUp(self) -> None:
        super().setUp()
        self.file = self.own / "counts.prom"
        self.now = self.open(mock.patch.object(time, "time", return_value=1e9))
        self.counts = popcon.CountFile(str(self.file))

    def add(self, *lines: str) -> None:
        self.counts.add("\n".join(lines).encode("utf-8", "surrogateescape"))

    def counted(self) -> dict[str, float]:
        """Return what is in the file, as one reads Prometheus' format."""
        lines = self.file.read_text("ascii").splitlines()
        samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name: float(value) for name, _, value in samples}

    def libraries(self) -> dict[str, float]:
        start = 'python_popcon_library_used{library="'
        found = self.counted().items()
        return {name[len(start) : -2]: n for name, n in found if name.startswith(start)}

    def since(self) -> float:
        return self.counted()["process_start_time_seconds"]

    def test_the_very_file(self) -> None:
        self.add(f"{PREFIX}numpy:1|c", f"{PREFIX}pandas:1|c")
        self.add(
            "python_popcon.namespace.physics.library_used.numpy:1|c",
            f"{PREFIX}numpy:1|c",
        )
        self.now.return_value += 7.5
        self.counts.save()
        self.assertEqual(self.file.read_text(), textwrap.dedent("""\
            process_start_time_seconds 1000000000.000
            popcon_collect_last_alive_time_seconds 1000000007.500
            python_popcon_library_used{library="numpy"} 2
            python_popcon_library_used{library="numpy",namespace="physics"} 1
            python_popcon_library_used{library="pandas"} 1
            """))  # fmt: skip

    def test_what_was_saved_is_read_again(self) -> None:
        self.add(f"{PREFIX}alpha:1|c|@0.3", f"{PREFIX}beta:1000000|c|@.0000001")
        self.add(
            f"{PREFIX}gamma:1|c|@999999999", f"{PREFIX}delta:999999999|c|@.0000000001"
        )
        self.add("python_popcon.namespace.A_b-1.library_used.alpha:7|c")
        self.counts.save()
        again = popcon.CountFile(str(self.file))
        self.now.return_value += 60
        again.load()
        self.assertEqual(again.numbers.keys(), self.counts.numbers.keys())
        for name, number in again.numbers.items():
            self.assertAlmostEqual(number / self.counts.numbers[name], 1, 12)
        again.add(f"{PREFIX}beta:1|c".encode())
        again.save()
        self.assertEqual(self.libraries()["beta"], 10_000_000_000_001)
        self.assertEqual(self.since(), 1e9)

    def test_sample_rates_are_scaled(self) -> None:
        for rate in ("1", "0.1", ".5", "1.0", "0.25", "00.5", "0.00000000000000001"):
            self.counts.numbers.clear()
            self.add(f"{PREFIX}alpha:1|c|@{rate}")
            self.assertEqual(self.counts.numbers, {b"alpha": 1 / float(rate)})

    def test_what_no_popcon_sends_is_left_out(self) -> None:
        for line in [
            "",
            "alpha:1|c",
            "x.library_used.alpha:1|c",
            "python_popcon.library_used.:1|c",
            "python_popcon.library_used.a.b:1|c",
            "python_popcon.library_used.Alpha:1|c",
            "python_popcon.library_used.al pha:1|c",
            "python_popcon.library_used.alph\u00e4:1|c",
            "python_popcon.library_used.alpha\u0661:1|c",
            'python_popcon.library_used.a"b:1|c',
            "python_popcon.library_used.-:1|c",
            "python_popcon.library_used.a--b:1|c",
            "python_popcon.library_used.alpha:-1|c",
            "python_popcon.library_used.alpha:1e9|c",
            "python_popcon.library_used.alpha:nan|c",
            "python_popcon.library_used.alpha:1111111111|c",
            "python_popcon.library_used.alpha:1|g",
            "python_popcon.library_used.alpha:1|c|@1.2.3",
            "python_popcon.library_used.alpha:1|c|@",
            "python_popcon.library_used.alpha:1|c|@nan",
            "python_popcon.library_used.alpha:1|c|#tag:x",
            "python_popcon.library_used.alpha:1|c ",
            " python_popcon.library_used.alpha:1|c",
            "python_popcon.library_used.alpha:1|c\0",
            "python_popcon.namespace.a.b.library_used.alpha:1|c",
            "python_popcon.namespace..library_used.alpha:1|c",
            'python_popcon.namespace.a"} 1.library_used.alpha:1|c',
            "python_popcon.namespace.a\udcff.library_used.alpha:1|c",
            f"python_popcon.library_used.{'x' * 201}:1|c",
            f"python_popcon.namespace.{'x' * 196}.library_used.alpha:1|c",
        ]:
            self.add(line)
            self.assertEqual((self.counts.numbers, self.counts.is_changed), ({}, False))
        self.add(
            "rubbish", f"{PREFIX}{'x' * 200}:1|c", "rubbish", f"{PREFIX}2to3:1|c", ""
        )
        self.assertEqual(self.counts.numbers, {b"x" * 200: 1, b"2to3": 1})

    def test_whatever_arrives_the_file_holds_names_and_can_be_read(self) -> None:
        random.seed(21)
        good = b"python_popcon.namespace.ab.library_used.alpha-beta:1|c|@0.5\n" * 3
        for _ in range(3000):
            datagram = bytearray(good)
            for _ in range(random.randrange(8)):
                datagram[random.randrange(len(datagram))] = random.choice(
                    b'\0\n\r"{}.|:@ 0aZ\xff-'
                )
            self.counts.add(bytes(datagram))
            self.counts.add(random.randbytes(random.randrange(100)))
        self.counts.save()
        line = r'python_popcon_library_used\{library="[a-z0-9-]+"(,namespace="[\w-]+")?\} [0-9.e+]+'
        for text in self.file.read_text("ascii").splitlines()[2:]:
            self.assertRegex(text, rf"\A{line}\Z")
        again = popcon.CountFile(str(self.file))
        again.load()
        self.assertEqual(again.numbers.keys(), self.counts.numbers.keys())
        self.assertGreater(len(again.numbers), 20)

    def test_more_names_than_enough_are_left_out_and_counting_begins_anew(self) -> None:
        said = io.StringIO()
        with (
            mock.patch.object(popcon, "MOST_NAMES", 2),
            contextlib.redirect_stderr(said),
        ):
            self.add(f"{PREFIX}alpha:1|c", f"{PREFIX}beta:1|c")
            self.now.return_value += 100
            self.add(f"{PREFIX}alpha:1|c")
            self.assertEqual(self.counts.since, 1e9)
            self.add(f"{PREFIX}gamma:1|c", f"{PREFIX}delta:1|c", f"{PREFIX}alpha:1|c")
        self.assertTrue(self.counts.is_changed)
        self.assertEqual(
            self.counts.numbers, {b"alpha": 3, b"beta": 1}
        )
        self.assertEqual(self.counts.since, 1e9 + 100)
        self.assertEqual(
            said.getvalue(), "popcon: 2 names are enough: new ones are left out\n"
        )

    def test_the_longest_names_take_little_memory(self) -> None:
        number = 10_000

        def add_all() -> None:
            for one in range(number):
                space = f"n{one:099}"
                self.add(f"python_popcon.namespace.{space}.library_used.{'x' * 100}:1|c")
            self.counts.save()

        for step in (add_all, popcon.CountFile(str(self.file)).load):
            tracemalloc.start()
            step()
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            # All in all it is to be below 50 MB. Python and the source need 23 MB.
            self.assertLess(peak / number * popcon.MOST_NAMES, 25e6)
        self.assertEqual(len(self.counts.numbers), number)

    def since_after(self, life: float, gap: float) -> float:
        """Return by how much since when moves where nobody listened for so long."""
        self.counts.since = 1e9
        self.counts.alive = 1e9 + life
        popcon.write_whole(str(self.file), self.counts.lines())
        self.now.return_value = 1e9 + life + gap
        again = popcon.CountFile(str(self.file))
        again.load()
        again.save()
        return self.since() - 1e9

    def test_a_short_gap_is_forgiven_and_a_long_one_begins_anew(self) -> None:
        hour, day = 3600, 86400
        self.assertEqual(self.since_after(hour, gap=1.9 * hour), 0)
        self.assertEqual(self.since_after(hour, gap=2.1 * hour), 3.1 * hour)
        self.assertEqual(self.since_after(100 * day, gap=0.9 * day), 0)
        self.assertEqual(self.since_after(100 * day, gap=1.1 * day), 101.1 * day)

    def test_clocks_that_are_set_claim_no_time_in_which_nobody_counted(self) -> None:
        self.counts.save()
        for clock, since in [
            (1e9 - 500, 1e9 - 500),  # it began in what is the future now
            (1e9, 1e9 - 500),
            (2e9, 2e9),  # the clock has no battery, and was set late
            (2e9 - 50, 2e9 - 50),
            (2e9 + 7000, 2e9 - 50),
        ]:
            self.now.return_value = clock
            self.counts.save()
            self.assertEqual(self.since(), since)

    def test_it_is_saved_nine_seconds_after_the_last_time_if_counts_have_changed(
        self,
    ) -> None:
        with mock.patch.object(time, "monotonic", return_value=1000.0) as clock:
            self.counts.save()
            for at, is_due in [
                (1059, False),  # nothing has changed
                (1061, True),  # so that it is known how long it was alive
            ]:
                clock.return_value = at
                self.assertEqual(self.counts.is_due(), is_due, at)
            self.counts.save()
            for at, is_due in [(1065, False), (1069, False), (1071, True)]:
                clock.return_value = at
                self.add(f"{PREFIX}alpha:1|c")
                self.assertEqual(self.counts.is_due(), is_due, at)
            self.counts.save()
            self.assertFalse(self.counts.is_due())

    def test_a_full_disk_is_told_once_and_the_counts_stay(self) -> None:
        self.add(f"{PREFIX}alpha:1|c")
        self.counts.save()
        whole = self.file.read_bytes()
        full = mock.patch.object(
            os, "fsync", side_effect=OSError(28, "No space left on device")
        )
        with contextlib.redirect_stderr(io.StringIO()) as said:
            self.add(f"{PREFIX}alpha:1|c")
            with full:
                self.counts.save()
                self.counts.save()
            self.assertEqual(self.file.read_bytes(), whole)
            self.assertTrue(self.counts.is_changed)
            self.counts.save()
        self.assertEqual(self.libraries(), {"alpha": 2})
        first, second = said.getvalue().splitlines()
        why = f"{self.file} cannot be written: No space left on device"
        self.assertEqual(
            first, f"popcon: {why}; the counts stay in memory until it works"
        )
        self.assertEqual(second, f"popcon: {self.file} is written again")
        self.assertEqual(os.listdir(self.own), ["counts.prom"])

    def test_a_link_that_somebody_else_has_made_is_not_followed(self) -> None:
        other = self.folder / "other"
        other.write_text("mine")
        (self.own / f"counts.prom.{os.getpid()}.unfinished").symlink_to(other)
        self.counts.save()
        self.assertEqual(other.read_text(), "mine")
        self.assertEqual(self.since(), 1e9)

    # As a process.

    def start_collect(
        self, *lines: str, file: Path | None = None, end: int = signal.SIGTERM
    ) -> tuple[int, str]:
        """Let a collect count these lines, end it by a signal, and return how it ended."""
        process, port = self.running(file)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for line in lines:
                sender.sendto(line.encode(), ("127.0.0.1", port))
        process.send_signal(end)
        _, said = process.communicate(timeout=60)
        return process.returncode, said.decode()

    def running(self, file: Path | None = None) -> tuple[subprocess.Popen[bytes], int]:
        """Start a collect, and return it with its port, once it listens."""
        port = free_port(socket.SOCK_DGRAM)
        listen = ["--listen", f"127.0.0.1:{port}"]
        command = [
            sys.executable,
            "popcon.py",
            "collect",
            str(file or self.file),
            *listen,
        ]
        process = subprocess.Popen(command, cwd=self.lone, stderr=subprocess.PIPE)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        assert process.stderr is not None
        self.addCleanup(process.stderr.close)
        self.said = b""
        while b"counting into" not in self.said:
            line = process.stderr.readline()
            self.assertTrue(line, self.said)
            self.said += line
        return process, port

    def test_sigterm_and_ctrl_c_lose_nothing(self) -> None:
        for number, name in enumerate((signal.SIGTERM, signal.SIGINT), 1):
            status, said = self.start_collect(*[f"{PREFIX}alpha:1|c"] * 50, end=name)
            self.assertEqual((status, said), (0, ""))
            self.assertEqual(self.libraries(), {"alpha": 50 * number})

    def test_it_waits_in_silence_and_ends_though_datagrams_keep_coming(self) -> None:
        process, port = self.running()
        with self.assertRaises(subprocess.TimeoutExpired):
            process.wait(2.5)  # it wakes up each second
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(f"{PREFIX}alpha:1|c".encode(), ("127.0.0.1", port))
            process.terminate()
            for _ in range(600):
                sender.sendto(b"rubbish", ("127.0.0.1", port))
                if process.poll() is not None:
                    break
                time.sleep(0.05)
        self.assertEqual(process.poll(), 0)
        self.assertEqual(self.libraries(), {"alpha": 1})

    def test_a_kill_loses_what_was_not_saved_and_nothing_else(self) -> None:
        self.start_collect(f"{PREFIX}alpha:1|c")
        status, _ = self.start_collect(f"{PREFIX}alpha:1|c", end=signal.SIGKILL)
        self.assertEqual(status, -signal.SIGKILL)
        self.assertIn(self.libraries()["alpha"], (1, 2))
        self.start_collect(f"{PREFIX}beta:1|c")
        self.assertEqual(self.libraries()["beta"], 1)

    def test_a_process_reports_and_usage_reads_it(self) -> None:
        self.install("alpha", "alpha.py")
        process, port = self.running()
        code = "import popcon; popcon.setup_reporter(); import alpha"
        self.run_python(code, **settings_for(port))
        process.terminate()
        process.wait()
        ended = self.popcon(
            f"usage --metrics {self.file} --json", PYTHONPATH=str(self.site)
        )
        rows = {row["library"]: row for row in json.loads(ended.stdout)}
        self.assertEqual(rows["alpha"]["processes"], 1)

    def test_a_thousand_datagrams_at_once_arrive(self) -> None:
        with mock.patch.object(popcon, "note") as note:
            popcon.listening("127.0.0.1", free_port(socket.SOCK_DGRAM)).close()
        if note.called:
            self.skipTest("the system limits the receive buffer (net.core.rmem_max)")
        self.start_collect(*[f"{PREFIX}alpha:1|c\n{PREFIX}beta:1|c"] * 1000)
        self.assertEqual(self.libraries(), {"alpha": 1000, "beta": 1000})

    def test_where_the_system_limits_the_buffer_it_says_what_to_set(self) -> None:
        with (
            mock.patch.object(popcon, "BUFFER", 1 << 28),
            contextlib.redirect_stderr(io.StringIO()) as said,
        ):
            popcon.listening("127.0.0.1", free_port(socket.SOCK_DGRAM)).close()
        self.assertRegex(
            said.getvalue(), r"as root: sysctl -w net.core.rmem_max=268435456\n\Z"
        )

    def refused(self, *arguments: str) -> str:
        """Return what a collect says that cannot count."""
        if not arguments:
            arguments = (
                str(self.file),
                "--listen",
                f"127.0.0.1:{free_port(socket.SOCK_DGRAM)}",
            )
        ended = self.popcon(shlex.join(["collect", *arguments]))
        self.assertEqual((ended.returncode, ended.stdout), (2, ""))
        self.assertRegex(ended.stderr, r"\Apopcon: .*\n\Z")
        return ended.stderr

    def test_what_could_not_be_saved_at_the_end_is_told(self) -> None:
        process, _ = self.running()
        self.file.unlink()
        self.file.mkdir()
        process.terminate()
        _, said = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 2)
        first, last = said.decode().splitlines()
        self.assertIn(f"popcon: {self.file} cannot be written: Is a directory", first)
        self.assertEqual(last, f"popcon: {self.file}: the last counts are lost")

    def test_the_second_of_two_says_so_and_ends(self) -> None:
        process, port = self.running()
        self.assertIn(f"another collect counts into {self.file}", self.refused())
        other = self.own / "other.prom"
        said = self.refused(str(other), "--listen", f"127.0.0.1:{port}")
        self.assertIn(
            f"cannot listen at 127.0.0.1:{port}: Address already in use", said
        )
        self.assertFalse(other.exists())
        process.kill()
        process.wait()
        self.assertEqual(self.start_collect()[0], 0)

    def test_a_file_of_somebody_else_or_a_damaged_one_is_left_and_named(self) -> None:
        self.counts.save()
        good = self.file.read_text()
        for text in (
            "my notes\n",
            "# my notes\n",
            "go_goroutines 8\n",
            good + "go_goroutines 8\n",
            "",
            good[:-40],
            good + 'python_popcon_library_used{library="alpha"} 1',
            good + 'python_popcon_library_used{library="alpha"} nan\n',
            good + 'python_popcon_library_used{library="al"pha"} 1\n',
            good.replace("popcon_collect", "x"),
            re.sub("(?m)^process_start.*\n", "", good),
            re.sub("(?m)^popcon_collect.*\n", "", good),
            "\0" * 100,
            "x" * 100_000,
        ):
            self.file.write_text(text)
            self.assertIn("was not written by collect", self.refused(), text[:100])
            self.assertEqual(self.file.read_text(), text)

    def test_of_a_huge_file_without_lines_only_the_beginning_is_read(self) -> None:
        self.file.touch()
        os.truncate(self.file, 50_000_000)
        tracemalloc.start()
        with self.assertRaisesRegex(OSError, "was not written by collect"):
            self.counts.load()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.assertLess(peak, 1_000_000)

    def test_what_is_no_file_or_in_no_folder_is_told(self) -> None:
        self.file.mkdir()
        self.assertIn(f"{self.file} is a folder, where a file is", self.refused())
        said = self.refused(str(self.own / "nowhere" / "counts.prom"))
        self.assertRegex(said, "nowhere/counts.prom cannot be written: No such file")

    def test_a_link_to_a_file_stays_one(self) -> None:
        link = self.own / "link.prom"
        link.symlink_to(self.file)
        self.start_collect(f"{PREFIX}alpha:1|c", file=link)
        self.assertTrue(link.is_symlink())
        self.assertEqual(self.libraries(), {"alpha": 1})

    def test_who_may_not_write_there_is_told(self) -> None:
        self.own.chmod(0o555)
        self.addCleanup(self.own.chmod, 0o755)
        command = [sys.executable, "popcon.py", "collect", str(self.file)]
        if os.geteuid() == 0:
            command = ["setpriv", "--bounding-set=-dac_override", *command]
        ended = subprocess.run(
            command, cwd=self.lone, capture_output=True, text=True, timeout=60
        )
        said = rf"\Apopcon: {self.file} cannot be written: Permission denied\n\Z"
        self.assertRegex(ended.stderr, said)
        self.assertEqual(ended.returncode, 2)

    def test_addresses(self) -> None:
        self.assertEqual(popcon.address("[::1]:9125"), ("::1", 9125))
        self.assertEqual(popcon.address("0.0.0.0:1"), ("0.0.0.0", 1))
        port = free_port(socket.SOCK_DGRAM)
        with contextlib.redirect_stderr(io.StringIO()):
            popcon.listening("localhost", port).close()
            if socket.has_ipv6:
                popcon.listening("::1", port).close()
        said = self.refused("x", "--listen", "nowhere.invalid:1")
        self.assertIn("cannot listen at nowhere.invalid:1: ", said)
        for host in (".x", "x" * 70, "x..y"):
            said = self.refused("x", "--listen", f"{host}:1")
            why = f"popcon: cannot listen at {host}:1: this is no name of a host\n"
            self.assertEqual(said, why)

    @unittest.skipUnless(EXPORTER, "needs POPCON_TEST_STATSD_EXPORTER")
    def test_it_counts_as_the_real_exporter_does(self) -> None:
        lines = [f"{PREFIX}alpha:1|c"] * 3
        lines += [f"{PREFIX}beta:2|c", f"{PREFIX}2to3:1|c"]
        for rate in ("0.1", ".5", "1", "0.3", "0.0", "1.0"):
            lines.append(f"{PREFIX}beta:1|c|@{rate}")
        for space in ("a-b", "C_d", "a.b"):
            lines.append(f"python_popcon.namespace.{space}.library_used.alpha:1|c")
        lines += ["x.y:1|c", f"{PREFIX}a.b:1|c", "rubbish"]
        lines += [f"{PREFIX}alpha:{value}" for value in ("-1|c", "x|c", "1|@0.1")]
        settings, metrics = self.open(self.exporter())
        port = int(settings["PYTHON_POPCONTEST_STATSD_PORT"])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for first in range(0, len(lines), 5):
                datagram = "\n".join(lines[first : first + 5]).encode()
                sender.sendto(datagram, ("127.0.0.1", port))
                self.counts.add(datagram)

        def theirs() -> dict[str, float]:
            name = "python_popcon_library_used{"
            return {
                one: value for one, value in metrics().items() if one.startswith(name)
            }

        self.counts.save()
        ours = self.counted()
        del (
            ours["process_start_time_seconds"],
            ours["popcon_collect_last_alive_time_seconds"],
        )
        self.wait_until(lambda: theirs().keys() == ours.keys(), tries=50)
        self.assertEqual(theirs().keys(), ours.keys())
        for name, value in theirs().items():
            self.assertAlmostEqual(value, ours[name], 9)


# ---- usage --------------------------------------------------------------------------

PROMETHEUS = os.environ.get("POPCON_TEST_PROMETHEUS", "").split(":")
VICTORIAMETRICS = os.environ.get("POPCON_TEST_VICTORIAMETRICS", "")
SERVERS = [path for path in (*PROMETHEUS, VICTORIAMETRICS) if path]
DAY = 86400.0
COUNTER = "python_popcon_library_used"
ONLY_SESSIONS = (
    "popcon: only IPython and Jupyter report here by themselves: scripts are not known, "
    "nor kernels of virtual environments upon this one\n"
)
COMMAND = {"entry_points.txt": "[console_scripts]\nx = y:main\n"}
PLUGIN = {"entry_points.txt": "[pytest11]\nx = y:main\n"}
REQUESTED = {"INSTALLER": "pip\n", "REQUESTED": ""}
SILENT = "its commands do not report"


class Outcome(NamedTuple):
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


class Database:
    """Answers as Prometheus does, of samples that are given to it."""

    def __init__(self) -> None:
        self.series: list[tuple[dict[str, str], dict[float, float]]] = []
        # Prometheus 2 takes the begin of a range to be in it, Prometheus 3 does not.
        self.is_closed = False

    def add_starts(self, samples: dict[float, float], **labels: str) -> None:
        """Add what an exporter tells of its start, by the time of the scrape."""
        name = {"__name__": "process_start_time_seconds"}
        target = {"job": "popcon", "instance": "x:9102"}
        self.series.append((name | target | labels, samples))

    def add_counter(
        self, library: str, samples: dict[float, float], **labels: str
    ) -> None:
        """Add the values of a library's counter, by the time of the scrape."""
        name = {"__name__": COUNTER, "library": library}
        target = {"job": "popcon", "instance": "x:9102"}
        self.series.append((name | target | labels, samples))

    def answer(self, asked: str) -> tuple[int, dict[str, str], bytes]:
        """Answer what comes after the server's address, be it of a GET or a POST."""
        path, _, query = asked.partition("?")
        form = dict(urllib.parse.parse_qsl(query))
        data: Any = {"result": []}
        if path.endswith("/series"):
            data = [labels for labels, _ in self.chosen(form["match[]"])]
        elif path.endswith("/query"):
            data = {"result": self.result(form["query"], float(form["time"]))}
        return 200, {}, json.dumps({"status": "success", "data": data}).encode()

    def chosen(self, selector: str) -> list[tuple[dict[str, str], dict[float, float]]]:
        """Return the series that {matchers} choose."""
        found = []
        for labels, samples in self.series:
            fits = True
            for name, how, text in re.findall(
                r'(\w+)(=~?)("(?:[^"\\]|\\.)*")', selector
            ):
                pattern = json.loads(text)
                if how == "=":
                    pattern = re.escape(pattern)
                fits = fits and bool(re.fullmatch(pattern, labels.get(name, "")))
            if fits:
                found.append((labels, samples))
        return found

    def result(self, query: str, end: float) -> list[dict[str, Any]]:
        """Return what function({matchers}[1ms]) gives at a time, or ({matchers}[1ms])."""
        function, _, rest = query.partition("(")
        selector, _, duration = rest.rpartition("[")
        begin = end - float(duration.removesuffix("ms])").removesuffix("ms)")) / 1000
        if self.is_closed:
            begin -= 1e-4
        found = []
        for labels, samples in self.chosen(selector):
            values = []
            for when, value in samples.items():
                is_marker = math.isnan(value) and function
                if begin < when <= end + 1e-4 and not is_marker:
                    values.append([when, str(value)])
            if function == "count_over_time" and values:
                values = [[end, str(len(values))]]
                labels = {name: labels[name] for name in labels if name != "__name__"}
            elif function:
                values = values[-1:]
            if values:
                found.append({"metric": labels, "values": values})
        return found


# Run in a large environment, with lists of libraries to be removed: nothing that stays
# needs one of them, as the packaging library reads the requirements.
STAYS = """
import importlib.metadata, json, sys
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

requirements = {}
for distribution in importlib.metadata.distributions():
    name = canonicalize_name(distribution.metadata["Name"])
    requirements[name] = [Requirement(text) for text in distribution.requires or ()]
for gone in json.loads(sys.argv[1]):
    assert requirements.keys() > set(gone)
    queue = [(name, "") for name in requirements if name not in gone]
    seen = set(queue)
    while queue:
        name, extra = queue.pop()
        for requirement in requirements.get(name, ()):
            marker = requirement.marker
            if marker is None or marker.evaluate({"extra": extra}):
                required = canonicalize_name(requirement.name)
                assert required not in gone, f"{name} needs {requirement}"
                for pair in [(required, ""), *((required, one) for one in requirement.extras)]:
                    if pair not in seen:
                        seen.add(pair)
                        queue.append(pair)
"""


class UsageCase(Case):
    """Runs the command usage where self.site holds all that is installed."""

    def setUp(self) -> None:
        super().setUp()
        self.now = round(time.time())
        self.source: tuple[str, ...] = ()  # from where usage is to read the counts
        self.says_only_sessions = False  # whether usage said so, the last time

    def usage(
        self,
        *arguments: str,
        path: Sequence[Path] = (),
        everyone: bool = False,
        terminal: bool = False,
        environ: dict[str, str] | None = None,
    ) -> Outcome:
        """Run the command as everybody's processes report, or only IPython's sessions."""
        settings = clean_environ(NO_PROXY="*", COLUMNS="80")
        settings.update(environ or {})
        out = io.StringIO()
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, settings, clear=True))
            stack.enter_context(
                mock.patch.object(sys, "path", [*map(str, path or [self.site])])
            )
            stack.enter_context(mock.patch.object(sys, "prefix", str(self.folder)))
            stack.enter_context(mock.patch.object(sys, "meta_path", [*sys.meta_path]))
            stack.enter_context(
                mock.patch.object(popcon, "everyone_reports", lambda: everyone)
            )
            stack.enter_context(mock.patch.object(os, "isatty", lambda _: terminal))
            stack.enter_context(contextlib.redirect_stdout(out))
            err = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            try:
                status = popcon.main(["usage", *self.source, *arguments])
            except SystemExit as error:
                status = int(error.code or 0)
        self.says_only_sessions = ONLY_SESSIONS in err.getvalue()
        said = err.getvalue().replace(ONLY_SESSIONS, "")
        return Outcome(status, out.getvalue(), said)

    def printed(self, *arguments: str, **options: Any) -> str:
        """Return what usage prints when it has an answer and nothing to remark."""
        outcome = self.usage(*arguments, **options)
        self.assertEqual((outcome.status, outcome.err), (0, ""))
        return outcome.out

    def rows(self, *arguments: str, **options: Any) -> dict[str, dict[str, Any]]:
        """Return what --json tells of each library."""
        rows = json.loads(self.printed("--json", *arguments, **options))
        names = [row.pop("library") for row in rows]
        self.assertEqual(names, sorted(set(names)))
        return dict(zip(names, rows))

    def verdicts(self, *arguments: str, **options: Any) -> dict[str, str]:
        """Return of each library its status, or why it cannot be judged."""
        rows = self.rows(*arguments, **options)
        return {name: row["reason"] or row["status"] for name, row in rows.items()}

    def processes(self, *arguments: str, **options: Any) -> dict[str, int]:
        """Return how many processes used each library that was used."""
        rows = self.rows(*arguments, **options)
        return {
            name: row["processes"] for name, row in rows.items() if row["processes"]
        }

    def assert_refused(self, sentence: str, *arguments: str, **options: Any) -> None:
        """Prove that it prints one sentence alone, and no secret, and that its status is 2."""
        with self.subTest(sentence, arguments=arguments):
            outcome = self.usage(*arguments, **options)
            self.assertEqual((outcome.status, outcome.out), (2, ""))
            self.assertRegex(outcome.err, r"\Apopcon: [^\n]{1,330}\n\Z")
            self.assertTrue(outcome.err.rstrip("\n").isprintable())
            self.assertRegex(outcome.err.rstrip("\n"), sentence)
            self.assertNotIn("hunter2", outcome.err)

    def metrics_file(self, *, since: object = 1.0, **counts: float) -> Path:
        """Save an exporter's metrics with these counts."""
        lines = ["# HELP x", f"process_start_time_seconds {since}"]
        for library, count in counts.items():
            lines.append(f'{COUNTER}{{library="{library}"}} {count}')
        path = self.folder / "metrics.txt"
        path.write_text("\n".join(lines) + "\n")
        return path

    def count(self, *, since: object = 1.0, **counts: float) -> None:
        """Let usage read these counts from now on."""
        path = self.metrics_file(since=since, **counts)
        self.source = ("--metrics", str(path))

    def requiring(self, name: str, *requirements: str, **options: Any) -> None:
        """Install a library with a module that requires these."""
        lines = "".join(f"Requires-Dist: {text}\n" for text in requirements)
        text = f"Metadata-Version: 2.1\nName: {name}\n{lines}\nRequires-Dist: doc\n"
        more = {"METADATA": text} | options.pop("more", {})
        files = options.pop("files", [f"{name}.py"])
        self.install(name, *files, more=more, **options)

    def install_all(self, *names: str) -> None:
        """Install libraries of one module each."""
        for name in names:
            self.install(name, f"{name}.py")

    def serve(self, answer: Callable[[str], tuple[int, dict[str, str], bytes]]) -> str:
        """Start a web server that answers so, and return its address.

        What it is asked is in self.asked.
        """
        asked: list[tuple[str, dict[str, str]]] = []

        class Handler(BaseHTTPRequestHandler):
            log_message = mock.Mock()

            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                path = self.path
                if length:
                    path += "?" + self.rfile.read(length).decode()
                asked.append((f"{self.command} {path}", dict(self.headers)))
                status, headers, body = answer(path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

        self.asked = asked
        server = self.open(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        self.addCleanup(server.shutdown)
        return f"http://127.0.0.1:{server.server_port}"


class TestUsage(UsageCase):
    def test_json_tells_of_each_library_what_is_documented(self) -> None:
        requirements = ("beta", "gone; python_version < '3'", "tester; extra == 'test'")
        self.requiring("Alpha", *requirements, more=PLUGIN | REQUESTED)
        self.install("beta", "beta.py", "beta_more/__init__.py", source="pass\n")
        self.install("tester", "tester.py", "tester_more/__init__.py", source="pass\n")
        self.install("stubs", "x-stubs/__init__.pyi")

        def size(name: str) -> int:
            return sum(path.stat().st_size for path in self.site.glob(f"{name}-*/*"))

        common = {
            "version": "1.0",
            "processes": 0,
            "required_by": [],
            "reason": "",
            "requested": False,
            "brought_by": [],
        }
        alpha = {
            "status": "used",
            "processes": 3,
            "bytes": size("Alpha"),
            "requested": True,
        }
        beta = {
            "status": "required",
            "required_by": ["alpha"],
            "bytes": size("beta") + 10,
        }
        private = {"status": "absent", "processes": 2, "version": None, "bytes": None}
        stubs = {
            "status": "unknown",
            "reason": "nothing to import",
            "bytes": size("stubs"),
        }
        tester = {"status": "unused", "bytes": size("tester") + 10}
        self.count(alpha=3, private=2, gone=0)
        rows = self.rows()
        self.assertEqual(rows.pop("alpha"), common | alpha)
        self.assertEqual(rows.pop("beta"), common | beta)
        self.assertEqual(rows.pop("private"), common | private)
        self.assertEqual(rows.pop("stubs"), common | stubs)
        self.assertEqual(rows.pop("tester"), common | tester)
        self.assertEqual(rows, {})

    def test_sizes_behind_links_are_those_of_the_files(self) -> None:
        self.write(self.folder, {"cache/linked.py": "x" * 2_000_000})
        self.install("linked", record="linked.py,,\nhard.py,,\ngone.py,,\n\0,,\n")
        os.symlink(self.folder / "cache/linked.py", self.site / "linked.py")
        os.link(self.folder / "cache/linked.py", self.site / "hard.py")
        self.count(other=1)
        self.assertEqual(self.rows()["linked"]["bytes"], 4_000_000)

    def test_the_library_of_selftest_is_never_shown(self) -> None:
        counts: Any = {"popcon-selftest": 7, "alpha": 1}
        self.count(**counts)
        self.assertEqual(self.processes(), {"alpha": 1})
        counts = {"popcon-selftest": 7}
        self.count(**counts)
        self.assert_refused("no count of .* rose")

    # Requirements.

    def test_what_a_library_that_stays_requires_stays(self) -> None:
        self.requiring(
            "root", "Mid_Dle[F.ast] (>=1)", "doc; extra == 'doc'", "sub[ a , b ]>1"
        )
        self.requiring(
            "mid.dle", "leaf", 'quick; extra == "F_ast"', "slow; extra=='slow'", "root"
        )
        self.requiring(
            "sub", "one; extra=='a'", "two; (extra == 'b') and os_name != 'x'"
        )
        self.requiring("orphan", "only-orphans")
        self.requiring(
            "broken", "saved ~~~ rubbish [; \\", "also @ https://x/y ; os_name > '3'"
        )
        self.requiring(
            "old", "tight; (extra == 'x')or(os_name >= '3')", "else; os_name == '-'"
        )
        needed = ("also", "else", "leaf", "one", "quick", "saved", "tight", "two")
        unused = ["doc", "only-orphans", "orphan", "slow"]
        self.install_all(*needed, "slow", "doc", "only-orphans")
        self.count(root=1, broken=1, old=1)
        expected = {"root": "used", "broken": "used", "old": "used"}
        expected |= dict.fromkeys((*needed, "mid-dle", "sub"), "required")
        expected |= dict.fromkeys(unused, "unused")
        self.assertEqual(self.verdicts(), expected)
        self.assertEqual(self.printed("--unused").split(), unused)

    def test_what_a_source_tree_requires_stays(self) -> None:
        self.install_all("leaf", "other")
        metadata = {
            "PKG-INFO": "Name: Mine\nVersion: 1.0\n",
            "requires.txt": "leaf\n[x]\nother\n",
        }
        self.write(self.own / "mine.egg-info", metadata)
        self.count(x=1)
        rows = self.rows(path=[self.own, self.site, self.folder / "none"])
        self.assertEqual(rows["leaf"]["required_by"], ["mine"])
        self.assertEqual(rows["other"]["status"], "unused")
        self.assertNotIn("mine", rows)

    def test_what_an_egg_requires_stays(self) -> None:
        self.install_all("more", "plain")
        information = "Name: egg\nRequires-Dist: plain\n"
        requires = "\n[:python_version >= '3']\nmore\n"
        metadata = {"PKG-INFO": information, "requires.txt": requires}
        self.write(self.site / "egg-1.0-py3.egg-info", metadata)
        self.count(x=1)
        rows = self.rows()
        self.assertEqual(rows["more"]["required_by"], ["egg"])
        self.assertEqual(rows["plain"]["required_by"], ["egg"])
        self.assertEqual(
            (rows["egg"]["status"], rows["egg"]["version"]), ("unknown", "1.0")
        )

    def test_the_version_is_in_the_name_of_the_metadata_or_in_them(self) -> None:
        text = "Metadata-Version: 1.2\nName: {}\nVERSION: 1.2\n\nVersion: 3\n"
        for folder in ("develop.egg-info", "spam-1.1-py3.11.egg-info"):
            name = re.split("[.-]", folder)[0]
            self.write(self.site / folder, {"PKG-INFO": text.format(name)})
        self.write(self.site, {"file-1.3.egg-info": "Name: file\n"})
        self.write(self.site / "none.egg-info", {"PKG-INFO": "Name: none\n"})
        self.count(x=1)
        versions = {name: row["version"] for name, row in self.rows().items()}
        expected = {"develop": "1.2", "file": "1.3", "none": "", "x": None}
        self.assertEqual(versions, expected | {"spam": "1.1"})

    def test_what_a_hidden_copy_requires_stays(self) -> None:
        self.install_all("new", "old")
        self.requiring("twice", "new")
        hidden = self.folder / "hidden"
        self.requiring("twice", "old", folder=hidden, info="twice-2.dist-info")
        self.count(twice=1)
        rows = self.rows(path=[self.site, self.site, hidden])
        self.assertEqual(rows["new"]["required_by"], ["twice"])
        self.assertEqual(rows["old"]["required_by"], ["twice"])
        self.assertEqual(rows["twice"]["version"], "1.0")

    def test_libraries_that_share_a_module_or_a_command_stay_together(self) -> None:
        self.install("full", "shared/__init__.py", "full.py")
        self.install("skinny", "shared/__init__.py", "LICENSE")
        self.install("other", "other.py", "LICENSE")
        self.install("tool", "tool.py", "../../bin/run", source="#!/usr/bin/python\n")
        self.install("twin", "twin.py", "../../bin/run", source="#!/usr/bin/python\n")
        expected = {
            "full": "used",
            "other": "unused",
            "skinny": "required",
            "tool": "required",
            "twin": "used",
        }
        self.count(full=1, twin=1)
        self.assertEqual(self.verdicts(everyone=True), expected)

    def test_extras_of_what_does_not_report_cannot_be_judged(self) -> None:
        own_extra = "langserver[all]; extra == 'x'"
        self.requiring("langserver", 'renamer; extra == "all"', own_extra, more=COMMAND)
        self.requiring("renamer", "deep")
        self.requiring("bigml", 'viewer; extra == "gui"')
        self.requiring("pip", 'keys; extra == "safe"')
        self.install_all("deep", "viewer", "keys")
        expected = {
            "bigml": "used",
            "deep": "required",
            "keys": "optional: pip",
            "langserver": SILENT,
            "pip": "runs sessions, or installs",
            "renamer": "optional: langserver",
            "viewer": "unused",
        }
        self.count(bigml=1)
        self.assertEqual(self.verdicts(), expected)

    def test_no_other_reason_hides_that_processes_do_not_report(self) -> None:
        # As python-lsp-server: others plug into it, and it has a command.
        both = {"entry_points.txt": "[pylsp]\nx = y\n[console_scripts]\nx = y:main\n"}
        files = ["pylsp/__init__.py"]
        extra = 'rope; extra == "all"'
        self.requiring("langserver", extra, files=files, more=both)
        self.requiring("used_one", 'part; extra == "all"', more=COMMAND)
        self.install_all("rope", "part")
        self.count(**{"used-one": 1})
        expected = {
            "langserver": "a plug-in, others find it",
            "part": "optional: used-one",
            "rope": "optional: langserver",
            "used-one": "used",
        }
        self.assertEqual(self.verdicts(), expected)
        # Where every process reports, only servers are often killed.
        expected["part"] = "unused"
        self.assertEqual(self.verdicts(everyone=True), expected)

    def test_what_requires_ipykernel_cannot_be_judged_and_what_that_requires_stays(
        self,
    ) -> None:
        self.requiring(
            "spyder-kernels", "ipykernel>=6", "cloudpickle", "qt; extra == 'gui'"
        )
        self.requiring("tested", "ipykernel; extra == 'test'", "lone")
        self.install_all("cloudpickle", "ipykernel", "lone", "qt")
        expected = {
            "cloudpickle": "required",
            "ipykernel": "required",
            "lone": "unused",
            "other": "absent",
            "qt": "optional: spyder-kernels",
            "spyder-kernels": "extends ipykernel",
            "tested": "unused",
        }
        self.count(other=1)
        self.assertEqual(self.verdicts(everyone=True), expected)

    def test_what_a_session_loads_if_it_is_there_cannot_be_judged(self) -> None:
        self.requiring("ipykernel", "jupyter_client")
        self.requiring("jupyter_client", 'orjson; extra == "orjson"')
        self.install_all("orjson")
        self.count(other=1)
        verdicts = self.verdicts(everyone=True)
        self.assertEqual(verdicts["orjson"], "optional: jupyter-client")

    # What cannot be judged.

    def verdict_on(
        self, name: str, *files: str, everyone: bool = False, **options: Any
    ) -> str:
        """Install a library, and return why it cannot be judged, or its status."""
        self.install(name, *files, **options)
        self.count(other=1)
        verdict = self.verdicts(everyone=everyone)[name]
        self.assertLessEqual(len(verdict), 27)  # to be read in 80 columns
        return verdict

    def test_what_nothing_speaks_for_is_unused(self) -> None:
        libraries = ("bundles.libs/libx-1a2b3c4d.so.3", "lib.abi3.so")
        self.assertEqual(self.verdict_on("bundles", "b.py", *libraries), "unused")
        local = {"direct_url.json": "{}"}
        self.assertEqual(self.verdict_on("local", "local.py", more=local), "unused")
        self.assertEqual(self.verdict_on("inner", "inner/x/bin/x.py"), "unused")

    def test_commands_do_not_report_where_only_sessions_do(self) -> None:
        python = "#!/usr/bin/python\n"
        target = self.verdict_on("target", "target.py", "bin/target", source=python)
        script = self.verdict_on(
            "script", "script.py", "../../bin/script", source=python
        )
        self.assertEqual(self.verdict_on("command", "command.py", more=COMMAND), SILENT)
        self.assertEqual((script, target), (SILENT, SILENT))

    def test_commands_of_python_report_where_every_process_does(self) -> None:
        python = "#!/usr/bin/python\n"
        script = ("script", "script.py", "../../bin/script")
        self.assertEqual(
            self.verdict_on(*script, source=python, everyone=True), "unused"
        )
        command = self.verdict_on("command", "command.py", more=COMMAND, everyone=True)
        self.assertEqual(command, "unused")
        binary = ("binary", "binary.py", "../../bin/fast")
        self.assertEqual(
            self.verdict_on(*binary, source="\x7fELF", everyone=True), SILENT
        )

    def test_a_program_that_ends_without_a_report_cannot_be_judged_however_deep(
        self,
    ) -> None:
        source = "from os import execvpe"  # as poetry does
        deep = ("deep", "deep/one/two/three/four.py")
        reason = self.verdict_on(*deep, source=source, more=COMMAND, everyone=True)
        self.assertEqual(reason, SILENT)
        module = ("module", "module/__main__.py")
        source = "signal.raise_signal(15)"
        self.assertEqual(self.verdict_on(*module, source=source, everyone=True), SILENT)
        # What is no program, or a test of one, does not count.
        source = "import os\nos.execv('x', [])"
        self.assertEqual(
            self.verdict_on("ends", "ends.py", source=source, everyone=True), "unused"
        )
        tested = ("tested", "tested/tests/test_x.py")
        reason = self.verdict_on(*tested, source=source, more=COMMAND, everyone=True)
        self.assertEqual(reason, "unused")

    def test_each_way_to_end_a_process_is_known(self) -> None:
        ways = ["os.execl('x')", "os._exit(0)", "os.abort()", "os.kill(os.getpid(), 9)"]
        for number, source in enumerate(ways):
            name = f"program{number}"
            files = [f"{name}/__main__.py"]
            reason = self.verdict_on(name, *files, source=source, everyone=True)
            self.assertEqual(reason, SILENT, source)

    def test_type_stubs_cannot_be_judged(self) -> None:
        stubs = "holds type stubs"
        files = ["django-stubs/__init__.pyi", "mypy_django_plugin/main.py"]
        self.assertEqual(self.verdict_on("django-stubs", *files), stubs)
        metadata = {"METADATA": "Name: typed\nClassifier: Typing :: Stubs Only\n\n"}
        self.assertEqual(self.verdict_on("typed", "typed.py", more=metadata), stubs)
        # A library may bring stubs for a part of itself.
        files = ["duck/__init__.py", "_duck-stubs/__init__.pyi", "_duck.so"]
        self.assertEqual(self.verdict_on("duck", *files), "unused")

    def test_bytecode_beside_commands_is_no_odd_path(self) -> None:
        files = (
            "jmespath/__init__.py",
            "../../bin/jp.py",
            "../../bin/__pycache__/jp.cpython.pyc",
        )
        python = "#!/usr/bin/python\n"
        self.assertEqual(self.verdict_on("jmespath", *files, source=python), SILENT)
        self.assertEqual(
            self.verdict_on("again", *files, source=python, everyone=True), "unused"
        )

    def test_odd_paths_of_modules_cannot_be_judged(self) -> None:
        odd = "odd paths in its RECORD"
        self.assertEqual(
            self.verdict_on("winwheel", record="winwheel\\__init__.py,,\n"), odd
        )
        self.assertEqual(
            self.verdict_on("split", "s.py", "../lib64/site-packages/s/x.py"), odd
        )
        record = f"{self.site}/../rooted.py,,\n"
        self.assertEqual(self.verdict_on("rooted", record=record), odd)

    def test_entry_points_for_oneself_are_no_plug_in(self) -> None:
        own = {"entry_points.txt": "[rasterio.rio_commands]\nx = y\n"}
        self.assertEqual(self.verdict_on("rasterio", "rasterio.py", more=own), "unused")
        own = {
            "entry_points.txt": "[console_scripts]\nx = y\n[Mark_Down.extensions]\nx = y\n"
        }
        verdict = self.verdict_on("mark-down", "markdown.py", more=own, everyone=True)
        self.assertEqual(verdict, "unused")

    def test_entry_points_for_others_are_a_plug_in(self) -> None:
        plug_in = "a plug-in, others find it"
        self.assertEqual(self.verdict_on("plug", "plug.py", more=PLUGIN), plug_in)
        longer = {"entry_points.txt": "[markdownlint.rules]\nx = y\n"}
        self.assertEqual(
            self.verdict_on("markdown", "markdown.py", more=longer), plug_in
        )

    def test_an_editable_install_says_so(self) -> None:
        linked = {
            "direct_url.json": '{"url": "file:///x", "dir_info": {"editable": true}}'
        }
        files = ("__editable__.mine.pth", "_mine.py")
        self.assertEqual(
            self.verdict_on("mine", *files, more=linked), "editable, or has no name"
        )

    def test_what_takes_part_in_every_start_cannot_be_judged(self) -> None:
        start = "takes part in every start"
        self.assertEqual(self.verdict_on("starts", "starts.py", "starts.pth"), start)
        self.assertEqual(self.verdict_on("custom", "sitecustomize.py"), start)
        self.assertEqual(
            self.verdict_on("inside", "inside/x.pth", "inside.py"), "unused"
        )

    def test_what_extends_jupyter_cannot_be_judged(self) -> None:
        files = ("lab.py", "../../share/jupyter/labextensions/x.json")
        self.assertEqual(self.verdict_on("lab", *files), "extends Jupyter")
        files = ("serves.py", "../../etc/jupyter/jupyter_x.d/x.json")
        self.assertEqual(self.verdict_on("serves", *files), "serves Jupyter")
        self.assertEqual(self.verdict_on("pip", "pip.py"), "runs sessions, or installs")

    def test_shared_libraries_cannot_be_judged(self) -> None:
        shared = "holds shared libraries"
        files = ("gv/__init__.py", "gv/lib/librt.so.12")
        self.assertEqual(self.verdict_on("gpu-runtime", *files), shared)
        self.assertEqual(self.verdict_on("winlib", "winlib.py", "winlib/x.dll"), shared)

    def test_what_lacks_metadata_cannot_be_judged(self) -> None:
        self.assertEqual(self.verdict_on("meta"), "nothing to import")
        bare = self.verdict_on("bare", "bare.py", record=None)
        self.assertEqual(bare, "has no RECORD of its files")
        nameless = "editable, or has no name"
        metadata = {"METADATA": "Version: 1"}
        self.assertEqual(self.verdict_on("nobody", "n.py", more=metadata), nameless)
        record = '"\0,\n' + "x" * 200000 + '"\n'
        metadata = {"METADATA": "\0"}
        self.assertEqual(
            self.verdict_on("rubbish", more=metadata, record=record), nameless
        )

    def test_hostile_metadata_do_not_take_for_ever(self) -> None:
        lines = {"entry_points.txt": "\n" * 1_000_000 + "[x]\n"}
        self.assertEqual(self.verdict_on("alpha", more=lines), "nothing to import")
        path = self.metrics_file(beta=1)
        with path.open("a") as file:
            file.write(f'{COUNTER}{{x="\n' * 100_000)
            file.write(f"{COUNTER}{{x\n" * 100_000)
        self.assertEqual(self.processes(), {"beta": 1})

    def test_what_is_to_be_kept_is_kept(self) -> None:
        self.install_all("kept_one", "kept_two", "other")
        self.count(x=1)
        verdicts = self.verdicts("--keep", "Kept_*")
        kept = "to be kept"
        expected = {
            "kept-one": kept,
            "kept-two": kept,
            "other": "unused",
            "x": "absent",
        }
        self.assertEqual(verdicts, expected)
        outcome = self.usage("--unused", "--keep", "kept-one", "alpa", "z*")
        self.assertEqual((outcome.status, outcome.out), (0, "kept-two\nother\n"))
        sentence = "popcon: nothing installed is called '{}', which was to be kept\n"
        self.assertEqual(outcome.err, sentence.format("alpa") + sentence.format("z*"))

    def test_what_is_loaded_at_start_or_by_configuration_is_not_called_unused(
        self,
    ) -> None:
        for name in ("drawn", "contents", "kernel", "startup", "remark", "early"):
            self.install(name, f"{name}_module.py")
        self.install("path", "path.py")  # a word in popcon's own start-up file
        settings = {
            "etc/ipython/ipython_config.py": "# such as remark_module\nc.X = 'drawn_module'",
            "etc/ipython/startup/50-x.py": "import startup_module",
            "etc/ipython/startup/000-popcon.py": popcon.SESSION,
            "etc/jupyter/jupyter_server_config.py": "c.ServerApp.x = 'contents_module.Manager'",
            "share/jupyter/kernels/x/kernel.json": '{"argv": ["python", "-m", "kernel_module"]}',
        }
        self.write(self.folder, settings)
        with mock.patch.object(sys, "path", [str(self.site)]):
            # Python lists the folder, as it does where it imports from there.
            importlib.machinery.PathFinder.find_spec("early_module")
        early = types.ModuleType("early_module")
        early.__file__ = str(self.site / "early_module.py")
        named = ("contents", "drawn", "kernel", "startup")
        expected = dict.fromkeys(named, "named in Jupyter's settings")
        expected |= {
            "early": "loaded at every start",
            "path": "unused",
            "remark": "unused",
            "other": "absent",
        }
        with mock.patch.dict(sys.modules, early_module=early):
            self.count(other=1)
            self.assertEqual(self.verdicts(), expected)

    # What is to be struck from a list of requirements.

    def section(self, title: str, text: str) -> list[str]:
        """Return the rows of a table below a title, with single spaces."""
        _, _, after = text.partition(f"\n{title} (")
        rows = after.partition("\n\n")[0].splitlines()[1:]
        return [" ".join(row.split()) for row in rows]

    def brought_by(self, **options: Any) -> dict[str, list[str]]:
        """Return by which names that can go each library was brought."""
        self.count(other=1)
        rows = self.rows(**options)
        return {
            name: row["brought_by"] for name, row in rows.items() if row["brought_by"]
        }

    def test_a_name_that_can_go_has_one_row_with_all_that_goes_along(self) -> None:
        self.requiring("app", "part", "shared")
        self.requiring("part", "deep")
        self.requiring("tool", "shared")
        self.install_all("deep", "lone")
        self.install("shared", "shared.py", source="#" * 3_000_000)
        self.install("used", "used.py", source="#" * 3_000_000)
        self.count(used=1)
        text = self.printed()
        first, *rows = self.section("Can go", text)
        self.assertEqual(first, "(several of these) 3.0 MB with shared")
        expected = ["app 0.0 MB with deep, part", "lone 0.0 MB", "tool 0.0 MB"]
        self.assertEqual(sorted(rows), expected)
        unused = self.printed("--unused").split()
        self.assertEqual(unused, ["app", "deep", "lone", "part", "shared", "tool"])
        *_, first, second = text.splitlines()
        said = (
            "6 of 7 libraries can go, 3.0 MB of 6.0 MB: strike 3 names from your list"
        )
        self.assertEqual(first, f"{said} of requirements.")
        self.assertRegex(
            second, "^No session that reported has imported them since 1970-"
        )
        brought = {"deep": ["app"], "part": ["app"], "shared": ["app", "tool"]}
        self.assertEqual(self.brought_by(), brought)

    def test_the_largest_row_comes_first(self) -> None:
        self.requiring("small", "huge")
        self.install("huge", "huge.py", source="#" * 3_000_000)
        self.install("middle", "middle.py", source="#" * 2_000_000)
        self.install("little", "little.py")
        self.count(other=1)
        text = self.printed()
        rows = self.section("Can go", text)
        self.assertEqual(
            rows, ["small 3.0 MB with huge", "middle 2.0 MB", "little 0.0 MB"]
        )

    def test_what_pip_was_asked_for_has_a_row_of_its_own(self) -> None:
        self.requiring("app", "part", more=REQUESTED)
        self.requiring("part", "deep", more=REQUESTED)
        self.install("deep", "deep.py", more={"INSTALLER": "pip\n"})
        self.install("extra", "extra.py", more={"INSTALLER": "pip\n"})
        self.count(other=1)
        text = self.printed()
        expected = [
            "app 0.0 MB",
            "extra 0.0 MB",
            "part 0.0 MB",
            "(several of these) 0.0 MB with deep",
        ]
        self.assertEqual(sorted(self.section("Can go", text)), sorted(expected))

    def test_uv_tells_of_nobody_who_was_asked_for(self) -> None:
        # It leaves REQUESTED beside every library; pip beside those it was asked for.
        uv = {"INSTALLER": "uv", "REQUESTED": ""}
        self.requiring("app", "part", more=uv)
        self.install("part", "part.py", more=uv)
        self.requiring("other-app", "other-part", more=REQUESTED)
        self.install("other-part", "other_part.py", more=REQUESTED)
        self.count(other=1)
        rows = self.rows()
        requested = [name for name, row in rows.items() if row["requested"]]
        self.assertEqual(requested, ["other-app", "other-part"])
        self.assertEqual(self.brought_by(), {"part": ["app"]})
        # With one that uv was not asked for, it does tell something.
        self.install("lone", "lone.py", more={"INSTALLER": "uv"})
        self.count(other=1)
        self.assertTrue(self.rows()["part"]["requested"])
        self.assertEqual(self.brought_by(), {})

    def write_collected(self, alive: float) -> str:
        """Write a file of collect that was last alive at a time; return its path."""
        file = self.folder / "collected.prom"
        file.write_text(
            "process_start_time_seconds 5\n"
            f"popcon_collect_last_alive_time_seconds {alive}\n"
            'python_popcon_library_used{library="alpha"} 1\n',
            encoding="utf-8",
        )
        return str(file)

    def test_a_collect_that_has_ended_gives_no_answer(self) -> None:
        self.install("alpha", "alpha.py")
        self.install("idle", "idle.py")
        path = self.write_collected(time.time() - 86400)
        outcome = self.usage("--metrics", path, "--unused")
        self.assertEqual((outcome.status, outcome.out), (1, ""))
        self.assertIn("No answer: collect has stopped", outcome.err)

    def test_a_collect_may_have_been_out_for_a_tenth_of_the_window(self) -> None:
        self.install("idle", "idle.py")
        for window, minutes, status in [
            ("1h", 116, 1),
            ("1h", 7, 1),
            ("1h", 5, 0),
            ("90d", 116, 0),
            ("90d", 90 * 24 * 60 / 100 + 1, 1),
            ("1m", 1.5, 0),  # it writes the file only once a minute
            ("1m", 2.5, 1),
        ]:
            path = self.write_collected(time.time() - 60 * minutes)
            outcome = self.usage("--metrics", path, "--window", window)
            self.assertEqual(outcome.status, status, (window, minutes, outcome.err))
            self.assertEqual("collect has stopped" in outcome.out, status == 1)

    def test_a_collect_that_lives_gives_an_answer(self) -> None:
        self.install("alpha", "alpha.py")
        self.install("idle", "idle.py")
        path = self.write_collected(time.time() - 60)
        outcome = self.usage("--metrics", path, "--unused")
        self.assertEqual((outcome.status, outcome.out), (0, "idle\n"))

    def test_a_huge_count_is_a_use(self) -> None:
        self.install("alpha", "alpha.py")
        self.install("idle", "idle.py")
        file = self.folder / "huge.prom"
        file.write_text(
            "process_start_time_seconds 5\n"
            'python_popcon_library_used{library="alpha"} 1e+15\n',
            encoding="utf-8",
        )
        outcome = self.usage("--metrics", str(file), "--unused")
        self.assertEqual((outcome.status, outcome.out), (0, "idle\n"))

    def test_a_file_of_metrics_without_a_count_is_no_answer_yet(self) -> None:
        now = int(time.time())
        file = self.folder / "fresh.prom"
        file.write_text(f"process_start_time_seconds {now - 5}\n", encoding="utf-8")
        self.install("alpha", "alpha.py")
        outcome = self.usage("--metrics", str(file), "--unused")
        self.assertEqual((outcome.status, outcome.out), (1, ""))
        self.assertIn("nothing was counted as python_popcon_library_used", outcome.err)

    def test_libraries_that_require_each_other_have_a_row(self) -> None:
        self.requiring("alpha", "beta")
        self.requiring("beta", "gamma")
        self.requiring("gamma", "alpha")
        self.count(other=1)
        text = self.printed()
        rows = self.section("Can go", text)
        self.assertEqual(rows, ["alpha 0.0 MB with beta, gamma"])
        self.assertEqual(self.brought_by(), {"beta": ["alpha"], "gamma": ["alpha"]})

    def test_who_brings_most_has_the_row_else_who_was_asked_for(self) -> None:
        self.requiring("zoo", "mid")
        self.requiring("mid", "leaf")
        self.requiring("alpha", "beta", "gamma")
        self.requiring("beta", "alpha", more=REQUESTED)
        self.install_all("gamma", "leaf")
        self.count(other=1)
        text = self.printed()
        rows = sorted(self.section("Can go", text))
        expected = ["beta 0.0 MB with alpha, gamma", "zoo 0.0 MB with leaf, mid"]
        self.assertEqual(rows, expected)

    def test_what_may_be_an_extra_in_use_came_with_nothing_that_can_go(self) -> None:
        self.requiring("tool", "part; extra == 'all'", more=COMMAND)
        self.requiring("app", "part")
        self.install("part", "part.py")
        self.count(other=1)
        text = self.printed()
        self.assertEqual(self.section("Can go", text), ["app 0.0 MB"])
        unknown = self.section("Cannot be judged", text)
        self.assertIn("part 0.0 MB optional: tool", unknown)

    def test_what_came_with_a_name_that_can_go_and_stays_says_so(self) -> None:
        self.requiring("numba", "llvmlite", "six", "shared", "asked")
        self.requiring("kept", "shared")
        self.install("llvmlite", "ll.py", "llvm/libllvm.so.1")
        self.install("asked", "asked.py", "asked/libasked.so.1", more=REQUESTED)
        self.install_all("shared", "six")
        self.count(six=4, kept=1)
        text = self.printed()
        expected = [
            "asked 0.0 MB holds shared libraries",
            "llvmlite 0.0 MB holds shared libraries; only for numba",
        ]
        self.assertEqual(self.section("Cannot be judged", text), expected)
        sentence = "Rebuilding without these names also drops llvmlite, six, which only"
        self.assertIn(sentence, " ".join(text.split()))
        rows = self.rows()
        self.assertEqual(
            (rows["six"]["status"], rows["six"]["brought_by"]), ("used", ["numba"])
        )
        self.assertEqual(
            (rows["shared"]["status"], rows["shared"]["brought_by"]), ("required", [])
        )

    # The table.

    def test_the_rarely_used_are_told_apart_on_request(self) -> None:
        self.requiring("rare", "rare-need", "unused-need", "base")
        self.requiring("often", "base")
        self.requiring("plug", "plug-need", more=PLUGIN)
        self.install_all("rare-need", "unused-need", "base", "never", "plug-need")
        counts: Any = {"rare": 4, "rare-need": 2, "often": 5, "base": 1, "plug": 1}
        counts |= {"private": 1, "plug-need": 1}
        self.count(**counts)
        text = self.printed("--at-most", "4", "--all")
        used = [
            "often 0.0 MB 5",
            "base 0.0 MB 1",
            "plug 0.0 MB 1",
            "plug-need 0.0 MB 1",
        ]
        rows = [
            row.rstrip(" #")
            for row in self.section("Used, by how many processes", text)
        ]
        self.assertEqual(sorted(rows), sorted(used))
        rows = self.section("Rarely used, by at most 4 processes", text)
        self.assertEqual(
            rows, ["rare 0.0 MB 4", "rare-need 0.0 MB 2", "unused-need 0.0 MB 0"]
        )
        self.assertEqual(self.section("Can go", text), ["never 0.0 MB"])
        self.assertIn("\n1 of 8 libraries can go, ", text)
        rows = self.section("Counted, but not installed here", text)
        self.assertEqual(rows, ["private 1"])
        unused = self.printed("--at-most", "4", "--unused").split()
        self.assertEqual(unused, ["never", "rare", "rare-need", "unused-need"])
        self.assertEqual(self.printed("--unused"), "never\n")
        self.assertEqual(self.rows("--at-most", "4"), self.rows())

    def test_one_process_is_no_processes(self) -> None:
        self.install("alpha", "alpha.py")
        self.count(alpha=1)
        text = self.printed("--at-most", "1")
        rows = self.section("Rarely used, by at most 1 process", text)
        self.assertEqual(rows, ["alpha 0.0 MB 1"])

    def test_the_heading_says_what_is_judged_and_since_when(self) -> None:
        self.install("alpha", "alpha.py", source="#" * 1_200_000)
        since = 1_700_000_000  # 2023-11-14 22:13:20 UTC
        self.count(since=since, beta=1)
        text = self.printed()
        first, second, *_ = text.splitlines()
        python = f"Python {sys.version.split()[0]} in {self.folder}"
        self.assertEqual(first, f"{python}: 1 library, 1.2 MB")
        self.assertEqual(second, "Window: 90d; counted since 2023-11-14 22:13 UTC")

    def test_sizes_that_are_not_known_are_left_out(self) -> None:
        self.install("bare", "bare.py", record=None)
        self.count(other=1)
        text = self.printed()
        self.assertRegex(text, f"in {self.folder}: 1 library\n")
        rows = self.section("Cannot be judged", text)
        self.assertEqual(rows, ["bare has no RECORD of its files"])
        self.assertIn("\nCannot be judged (1 library)\n", text)

    def test_rows_that_ask_for_nothing_are_one_line(self) -> None:
        counts: Any = {f"used-{number}": number + 1 for number in range(25)}
        counts |= {f"absent-{number}": 1 for number in range(23)}
        for number in range(25):
            self.requiring(f"used-{number}", f"need-{number}")
            self.install_all(f"need-{number}", f"never-{number}")
            self.install(f"plug-{number}", f"plug_{number}.py", more=PLUGIN)
        self.count(**counts)
        text = self.printed()
        used = self.section("Used, by how many processes", text)
        self.assertRegex(used[0], r"^used-24 0\.0 MB 25 #{30}$")
        self.assertEqual((len(used), used[-1]), (21, "5 more: --all lists them"))
        self.assertEqual(len(self.section("Can go", text)), 25)
        unknown = self.section("Cannot be judged", text)
        self.assertEqual((len(unknown), unknown[-1]), (21, "5 more: --all lists them"))
        self.assertIn("\nNeeded by others (25 libraries, 0.0 MB): --all lists them\n", text)
        absent = self.section("Counted, but not installed here", text)
        self.assertEqual((len(absent), absent[-1]), (6, "18 more: --all lists them"))
        everything = self.printed("--all")
        self.assertNotIn("--all", everything)
        needed = self.section("Needed by others", everything)
        self.assertIn("need-0 0.0 MB used-0", needed)
        self.assertEqual(len(needed), 25)

    def test_the_table_fits_a_terminal_in_ascii_and_nothing_is_cut_in_a_pipe(
        self,
    ) -> None:
        parts = [f"part-{number}" for number in range(30)]
        self.requiring("whole", *parts)
        self.install_all("alpha", "delta-" + "x" * 80, *parts)
        self.install("plug", "plug.py", more=PLUGIN)
        self.count(alpha=1000, beta=500)
        for columns, width in (("60", 60), ("80", 80), ("200", 200), ("20", 60)):
            text = self.printed(environ={"COLUMNS": columns}, terminal=True)
            self.assertTrue(text.isascii())
            heading, *lines = text.splitlines()
            self.assertLessEqual(max(map(len, lines)), width)
            self.assertIn("  alpha ", text)
            self.assertRegex(text, r"with part-0.*, \.\.\.\n")
            self.assertRegex(text, "1,000  #{9,30}\n")
        text = self.printed(environ={"COLUMNS": "60"})
        self.assertIn("with " + ", ".join(sorted(parts)) + "\n", text)
        self.assertIn("delta-" + "x" * 80, text)
        self.assertIn("#" * 30, text)

    def test_names_that_have_no_room_are_left_out(self) -> None:
        for number in range(20):
            extra = 'part; extra == "all"'
            self.requiring(f"command-{number}", extra, more=COMMAND)
            self.requiring(f"app-{number}", "library")
        self.install("part", "part.py", source="#" * 3_000_000)
        self.install("library", "library.py", "x/libx.so.1", source="#" * 2_000_000)
        self.count(other=1)
        text = self.printed(terminal=True)
        first, second, *_ = self.section("Cannot be judged", text)
        start = "library 4.0 MB holds shared libraries"
        self.assertEqual(first, f"{start}; only for app-0, ...")
        start = "part 3.0 MB optional: command-0, command-1,"
        self.assertEqual(second, f"{start} ...")

    def test_sizes_have_three_digits(self) -> None:
        sizes = {99_900_000: "99.9 MB", 99_950_000: "100 MB", 999_500_000: "1.0 GB"}
        for size, expected in sizes.items():
            library = popcon.Library("alpha")
            library.size = size
            self.assertEqual(popcon.size_text([library]), expected)

    def test_it_says_whose_imports_are_known(self) -> None:
        self.install("alpha", "alpha.py")
        self.count(beta=1)
        sentence = "that reported has imported them since 1970-01-01 00:00 UTC, "
        sentence += "and nothing that stays needs them."
        last = self.printed().splitlines()[-1]
        self.assertEqual(last, f"No session {sentence}")
        last = self.printed(everyone=True).splitlines()[-1]
        self.assertEqual(last, f"No process {sentence}")

    def test_it_says_so_if_only_sessions_report_and_something_can_go(self) -> None:
        self.install("alpha", "alpha.py")
        self.count(beta=1)
        self.printed()
        self.assertTrue(self.says_only_sessions)
        self.printed(everyone=True)
        self.assertFalse(self.says_only_sessions)
        self.count(alpha=1)
        self.printed()
        self.assertFalse(self.says_only_sessions)

    def test_it_says_where_nothing_can_go(self) -> None:
        self.install("alpha", "alpha.py")
        self.count(alpha=1)
        last = self.printed().splitlines()[-1]
        self.assertEqual(last, "None of 1 library can go.")

    def test_it_says_what_the_counts_do_not_know(self) -> None:
        self.install("alpha", "alpha.py")
        self.count(beta=1)
        rate = {"PYTHON_POPCONTEST_STATSD_SAMPLE_RATE": "0.5"}
        outcome = self.usage("--unused", environ=rate)
        said = "popcon: a sample of 0.5 of the processes reports: rare uses may be missed\n"
        self.assertEqual(outcome, (0, "alpha\n", said))
        self.count(ray=1, rq=3)
        outcome = self.usage("--unused")
        said = "popcon: what workers of ray, rq import is known only if they call popcon.report()\n"
        self.assertEqual(outcome, (0, "alpha\n", said))

    def test_it_asks_whether_the_environment_is_the_right_one(self) -> None:
        self.install_all("alpha", "beta")
        counts = {f"absent{number}": 1.0 for number in range(183)}
        self.count(**counts)
        outcome = self.usage()
        said = f"183 libraries were counted that are not installed in {self.folder}, "
        said += "which has 2: is it the right environment?"
        self.assertEqual(outcome.err, f"popcon: {said}\n")
        counts = {f"absent{number}": 1.0 for number in range(5)}
        self.count(**counts)
        self.printed()

    def test_counts_below_k_are_veiled(self) -> None:
        self.install_all("alpha", "beta", "gamma", "never")
        self.count(beta=4, alpha=3, gamma=5, private=1)
        text = self.printed("--at-least", "5")
        used = [
            row.rstrip(" #")
            for row in self.section("Used, by how many processes", text)
        ]
        self.assertEqual(used, ["gamma 0.0 MB 5", "alpha 0.0 MB <5", "beta 0.0 MB <5"])
        absent = self.section("Counted, but not installed here", text)
        self.assertEqual(absent, ["private <5"])
        counts = {}
        for name, row in self.rows("--at-least", "5").items():
            counts[name] = row["processes"]
        hidden = dict.fromkeys(("alpha", "beta", "private"))
        self.assertEqual(counts, hidden | {"gamma": 5, "never": 0})

    # An exporter's own metrics, and how far they reach back.

    def test_counts_that_do_not_reach_back_are_no_answer_yet(self) -> None:
        self.install("alpha", "alpha.py")
        self.count(since=time.time() - 12 * DAY - 5, other=1)
        doubt = "No answer yet: the counts reach back 12d of 90d; try --window 12d"
        outcome = self.usage("--unused", "--at-most", "3")
        self.assertEqual(outcome, (1, "", f"popcon: {doubt}\n"))
        outcome = self.usage("--json")
        self.assertEqual((outcome.status, outcome.err), (1, f"popcon: {doubt}\n"))
        self.assertEqual(json.loads(outcome.out)[0]["reason"], "No answer yet")
        outcome = self.usage()
        self.assertEqual((outcome.status, outcome.err), (1, ""))
        self.assertEqual(outcome.out.splitlines()[-1], doubt)
        unknown = self.section("Cannot be judged", outcome.out)
        self.assertEqual(unknown, ["alpha 0.0 MB No answer yet"])
        self.assertEqual(self.printed("--unused", "--window", "12d"), "alpha\n")

    def test_a_hundredth_of_the_window_may_lack(self) -> None:
        self.count(since=time.time() - 99.5 * DAY, other=1)
        self.assertEqual(self.usage("--window", "100d").status, 0)
        self.count(since=time.time() - 98.5 * DAY, other=1)
        self.assertEqual(self.usage("--window", "100d").status, 1)

    def test_durations_are_told_in_the_unit_that_was_given_or_a_smaller_one(
        self,
    ) -> None:
        window = popcon.Window
        self.assertEqual(window("10m").in_its_unit(299), "4m")
        self.assertEqual(window("90d").in_its_unit(12.9 * DAY), "12d")
        self.assertEqual(window("90d").in_its_unit(0.3 * DAY), "7h")
        self.assertEqual(window("2w").in_its_unit(13 * DAY), "1w")
        self.assertEqual(window("1h").in_its_unit(0.02), "20ms")
        self.assertEqual(window("1h").in_its_unit(0), "0s")
        self.assertEqual(window("1y").seconds, 365 * DAY)
        self.assertEqual(window("5ms").seconds, 0.005)
        self.count(since=time.time() + 60, other=1)
        outcome = self.usage("--window", "1h", "--unused")
        said = "popcon: No answer yet: the counts reach back 0s of 1h\n"
        self.assertEqual((outcome.status, outcome.err), (1, said))

    def test_a_file_of_metrics_is_read_as_the_format_has_it(self) -> None:
        now = time.time()
        lines = [
            "process_start_time_seconds 1e+00",
            f'process_start_time_seconds{{x="y"}} {now - 3600}',
            COUNTER + '{library="ruamel.yaml"} 1',
            COUNTER + '{x="a} b\\"\u2028",library="ruamel-yaml"} 2 1700000000',
            COUNTER + '{library="rare",sublibrary="no"} 0.3 # {trace_id="x"} 7',
            COUNTER + '_created{library="no"} 5',
            COUNTER + '{sublibrary="no"} 5',
            COUNTER + '{library="odd"} NaN',
            COUNTER + '{library="endless"} 1e999',
            COUNTER + '{namespace="physics",library="numpy"} 12',
            COUNTER + '{namespace="prod",library="numpy"} 30',
            COUNTER + '{library="numpy"} 1',
            "",
        ]
        path = self.folder / "saved.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        counts = {"endless": 10**12, "numpy": 43, "rare": 1, "ruamel-yaml": 3}
        self.assertEqual(
            self.processes("--metrics", str(path), "--window", "1h"), counts
        )
        # Of several exporters in a file the youngest tells since when.
        self.assertIn("reach back 1h of 90d", self.usage("--metrics", str(path)).out)
        path.write_text("\n".join(lines).replace(COUNTER, "a_b_c"), encoding="utf-8")
        prefix = {"PYTHON_POPCONTEST_STATSD_PREFIX": "a.namespace.x.b-c"}
        found = self.processes(
            "--metrics", str(path), "--window", "60m", environ=prefix
        )
        self.assertEqual(found, counts)

    def test_the_age_of_a_file_is_told(self) -> None:
        self.count(alpha=1)
        then = time.time() - 3.5 * DAY
        os.utime(self.folder / "metrics.txt", (then, then))
        said = "popcon: the file is 3d old: later uses are not in it\n"
        self.assertEqual(self.usage().err, said)

    def test_odd_clocks_are_no_traceback(self) -> None:
        self.install("alpha", "alpha.py")
        self.count(since=1e300, x=1)
        self.assertEqual(self.usage().status, 1)
        self.count(since=-1e300, x=1)
        self.assertEqual(self.usage().status, 0)
        for since in ("NaN", "+Inf", "1.2.3"):
            self.count(since=since, x=1)
            self.assert_refused("no exporter's /metrics")

    def test_closed_streams_are_no_traceback(self) -> None:
        self.install("alpha", "alpha.py")
        self.count(x=1)
        arguments = ["usage", *self.source, "--unused"]
        code = "import popcon, sys; sys.{} = None; sys.exit(popcon.main())"
        run = self.run_python(code.format("stdout"), "-S", arguments=arguments)
        self.assertEqual(
            (run.returncode, run.stdout, run.stderr), (0, "", ONLY_SESSIONS)
        )
        run = self.run_python(code.format("stderr"), "-S", arguments=arguments)
        self.assertEqual((run.returncode, run.stdout, run.stderr), (0, "alpha\n", ""))

    def test_sources_that_cannot_be_read_get_one_sentence(self) -> None:
        path = self.metrics_file(alpha=1, beta=1)
        path.write_bytes(path.read_bytes()[:-1])
        path = path.rename(self.folder / "counts.prom")
        cut = "no exporter's /metrics, or not all of it: '# HELP"
        self.assert_refused(cut, "--metrics", str(path))
        self.assert_refused("(?=.*No such file).*/no/such", "--metrics", "/no/such")
        self.assert_refused("(?=.*Is a directory).*/", "--metrics", "/")
        url = "localhost:9102/metrics"
        self.assert_refused(f"(?=.*No such file).*{url}", "--metrics", url)

    def test_counters_of_another_name_are_missed(self) -> None:
        self.count(alpha=1)
        prefix = {"PYTHON_POPCONTEST_STATSD_PREFIX": "a.b"}
        sentence = "no count of a_b rose in 90d: do PYTHON_POPCONTEST_STATSD_PREFIX and "
        self.assert_refused(sentence, environ=prefix)

    def test_web_servers_that_are_no_exporter_get_one_sentence(self) -> None:
        body = self.metrics_file(alpha=1).read_bytes()
        length = {"Content-Length": str(len(body))}
        page = self.serve(lambda asked: (200, {}, b"<!DOCTYPE html>"))
        hint = "no exporter's /metrics, or not all of it: '<!DOC"
        self.assert_refused(hint, "--metrics", f"{page}/?token=hunter2")
        gone = self.serve(lambda asked: (404, {}, b"gone"))
        self.assert_refused("answers 404 Not Found$", "--metrics", gone)
        cut_off = self.serve(lambda asked: (200, length, body[:-22]))
        self.assert_refused("its answer is cut off", "--metrics", cut_off)
        whole = self.serve(lambda asked: (200, {}, body))
        prefix = {"PYTHON_POPCONTEST_STATSD_PREFIX": "x"}
        given = ("--metrics", f"{whole}/?hunter2")
        self.assert_refused("no count of x rose", *given, environ=prefix)
        nowhere = f"http://127.0.0.1:{free_port()}"
        refused = "metrics cannot be read: .*refused$"
        self.assert_refused(refused, "--metrics", f"{nowhere}/metrics?token=hunter2")
        self.assert_refused("Invalid IPv6 URL|IPv6", "--metrics", "http://[::1")

    def test_an_answer_of_more_than_256_mb_is_refused(self) -> None:
        body = self.metrics_file(alpha=1).read_bytes()
        url = self.serve(lambda asked: (200, {}, body))
        with mock.patch.object(popcon, "ANSWER_LIMIT", len(body)):
            self.assertEqual(self.processes("--metrics", url), {"alpha": 1})
        with mock.patch.object(popcon, "ANSWER_LIMIT", len(body) - 1):
            self.assert_refused("is cut off, or has no end", "--metrics", url)

    # A Prometheus of these samples.

    def database(self) -> tuple[Database, list[float]]:
        """Let usage read a database, for 100 days; return it, and a time on each day.

        The first is half an hour before the window.
        """
        database = Database()
        url = self.serve(database.answer)
        self.source = ("--prometheus", url, "--window", "100d")
        start = self.now - 3 - 100 * DAY
        days = [start - 1800 + number * DAY for number in range(101)]
        return database, days

    def test_counts_are_exact_through_restarts_markers_and_clocks_that_are_set(
        self,
    ) -> None:
        for is_closed in (False, True):
            database, days = self.database()
            database.is_closed = is_closed
            first = days[:50]
            second = [first[-1] + 1800, first[-1] + DAY]
            third = [second[-1] + 1800 + 0.5 * number * DAY for number in range(100)]
            starts = dict.fromkeys(first, 5.0)
            # Its clock was set twice, and a marker tells when it ended.
            starts |= dict.fromkeys(first[10:20], 6.0)
            starts |= dict.fromkeys(first[20:], 4.0)
            starts[first[-1] + 60] = math.nan
            starts |= dict.fromkeys(second, second[0] - 9)
            starts |= dict.fromkeys(third, third[0] - 9)
            starts = {first[0] - 1800: 5.0} | starts
            database.add_starts(starts)
            # Once before the window, and once in each later life.
            database.add_counter("again", dict.fromkeys([*first, *second, *third], 1.0))
            before = {first[0] - 1800: 6.0} | dict.fromkeys(first, 7.0)
            before[first[-1] + 60] = math.nan
            database.add_counter("before", before)
            database.add_counter("once", {second[-1]: 1.0, second[-1] + 60: math.nan})
            database.add_counter("late", {third[-1]: 1.0}, namespace="prod")
            database.add_counter("late", {third[-1]: 1.0})
            database.add_counter("not a name", {third[-1]: 1.0})
            self.assertEqual(self.processes(), {"again": 2, "late": 2, "once": 1})

    def test_a_start_that_is_told_much_earlier_is_another_life(self) -> None:
        database, days = self.database()
        first, second = days[:50], [when - 3600 for when in days[50:]]
        starts = dict.fromkeys(first, 5000.0) | dict.fromkeys(second, 5000.0 - 61)
        database.add_starts(starts)
        database.add_counter("again", dict.fromkeys([*first, *second], 1.0))
        self.assertEqual(self.processes(), {"again": 1})

    def test_exporters_of_two_clusters_with_the_same_address_are_told_apart(
        self,
    ) -> None:
        database, days = self.database()
        for cluster, value in (("a", 2.0), ("b", 3.0)):
            times = [when + 0.1 * value * DAY for when in days[:-1]]
            same = dict.fromkeys(times, value)
            later = same | dict.fromkeys(times[1:], value + 4)
            database.add_starts(same, cluster=cluster, namespace="mon")
            database.add_counter("beta", same, cluster=cluster, namespace="mon")
            database.add_counter("alpha", later, cluster=cluster, namespace="prod")
            database.add_counter("idle", dict.fromkeys(times, 0.0), cluster=cluster)
        self.install("beta", "beta.py")
        both = {"alpha": 13, "beta": 5}
        self.assertEqual(self.processes(), both)
        self.assertEqual(self.processes("--match", "{ }"), both)
        some = self.processes("--match", ' {cluster="a", }')
        self.assertEqual(some, {"alpha": 6, "beta": 2})
        for text in ('\t{\tcluster="a"\t}\t', '{cluster="a",}\r\n', '{cluster="a"}\v'):
            self.assertEqual(self.processes("--match", text), some)
            ((question, _), *_) = self.asked[-1:]
            query = dict(urllib.parse.parse_qsl(question))["GET /api/v1/query?query"]
            self.assertIn(f'(\x7b__name__="{COUNTER}",cluster="a",', query)
        sentence = "no count of .* rose in 100d: do .*_PREFIX and --match fit"
        self.assert_refused(sentence, "--match", '{x="y"}')

    def test_the_value_of_a_label_may_speak_of_a_library(self) -> None:
        database, days = self.database()
        labels = {"job": "library=1", "x": "\"library\"!='y'"}
        database.add_starts(dict.fromkeys(days, 5.0), **labels)
        samples = dict.fromkeys(days[:-1], 1.0) | {days[-1]: 2.0}
        database.add_counter("alpha", samples, **labels)
        for match in (
            '{job="library=1"}',
            '{job=~"library=." , x="\\"library\\"!=\'y\'"}',
        ):
            self.assertEqual(self.processes("--match", match), {"alpha": 1})

    def test_a_long_query_goes_by_post(self) -> None:
        database, days = self.database()
        database.add_starts(dict.fromkeys(days, 5.0))
        database.add_counter("alpha", dict.fromkeys(days[:-1], 1.0) | {days[-1]: 2.0})
        match = '{job=~"popcon|' + " " * 2000 + '"}'
        self.assertEqual(self.processes("--match", match), {"alpha": 1})
        long = [question for question, _ in self.asked if len(question) > 2000]
        self.assertTrue(long)
        for question in long:
            self.assertRegex(question, "^POST ")

    def test_an_exporter_that_two_servers_scrape_into_one_store_counts_once(
        self,
    ) -> None:
        self.install("alpha", "alpha.py")
        database, days = self.database()
        # The second server came in the middle, and the first one was switched off then.
        for server, times in (
            ("a", days[:60]),
            ("b", [when + 7 for when in days[40:]]),
        ):
            database.add_starts(dict.fromkeys(times, 5.0), server=server)
            rising = {
                when: 3.0 + (when > days[50]) + (when > days[70]) for when in times
            }
            database.add_counter("beta", rising, server=server, namespace="prod")
            database.add_counter("beta", rising, server=server, namespace="test")
            database.add_counter("alpha", dict.fromkeys(times, 1.0), server=server)
        self.assertEqual(self.processes(), {"beta": 4})
        self.assertEqual(self.printed("--unused"), "alpha\n")

    def ended(self, *samples: dict[float, float]) -> bool:
        """Tell whether usage says that a counter with these samples, alpha's, ended too early."""
        database, days = self.database()
        database.add_starts(dict.fromkeys(days, 5.0))
        (first, *_) = samples
        database.add_counter("alpha", first, namespace="one")
        rising = dict.fromkeys(days, 1.0) | dict.fromkeys(days[51:], 2.0)
        database.add_counter("used", rising)
        outcome = self.usage("--unused")
        said = "No answer: counters ended before their exporter; give no ttl in its mapping"
        if outcome.status == 0:
            self.assertEqual(outcome.err, "")
            return False
        self.assertEqual(outcome, (1, "", f"popcon: {said}\n"))
        table = self.usage()
        self.assertEqual(table.out.splitlines()[-1], said)
        return True

    def test_series_that_end_before_their_exporter_are_no_answer(self) -> None:
        self.install_all("alpha", "beta")
        _, days = self.database()
        gone = {days[40]: math.nan}
        two = dict.fromkeys(days[:40], 2.0)
        one = dict.fromkeys(days[:40], 1.0)
        back = dict.fromkeys(days[60:], 1.0)
        self.assertTrue(self.ended(two | gone | back))
        self.assertTrue(self.ended(one | gone | back))
        self.assertTrue(self.ended(one | gone))
        self.assertTrue(self.ended(dict.fromkeys(days[9:40], 3.0) | gone))
        self.assertFalse(self.ended(dict.fromkeys(days, 1.0)))

    def test_a_counter_that_ended_may_have_labels_of_its_own(self) -> None:
        self.install("alpha", "alpha.py")
        database, days = self.database()
        # With honor_labels its namespace is not that of its exporter.
        database.add_starts(dict.fromkeys(days, 5.0), namespace="monitoring")
        ended = dict.fromkeys(days[:40], 1.0)
        database.add_counter("alpha", ended, namespace="prod")
        rising = dict.fromkeys(days, 1.0) | {days[-1]: 2.0}
        database.add_counter("used", rising, namespace="prod")
        self.assertIn("No answer: counters ended", self.usage("--unused").err)

    def test_a_lost_sample_is_no_lost_counter(self) -> None:
        self.install("alpha", "alpha.py")
        _, days = self.database()
        one_is_lost = dict.fromkeys(days, 1.0)
        del one_is_lost[days[50]]
        self.assertFalse(self.ended(one_is_lost))
        del one_is_lost[days[51]]
        self.assertTrue(self.ended(one_is_lost))

    def test_the_last_scrape_before_the_window_tells_what_came_before(self) -> None:
        database, days = self.database()
        database.add_starts(dict.fromkeys(days, 5.0))
        # One was used right before the window, and one before its first scrape in it.
        before = {days[0] - 1800: 1.0} | dict.fromkeys(days, 2.0)
        database.add_counter("before", before)
        database.add_counter("early", {days[0]: 1.0} | dict.fromkeys(days[1:], 2.0))
        # Another exporter ended before the window.
        database.add_starts({days[0]: 6.0}, instance="y:9102")
        database.add_counter("ended", {days[0]: 1.0}, instance="y:9102")
        self.assertEqual(self.processes(), {"early": 1})

    def test_a_counter_may_begin_within_the_window(self) -> None:
        self.install("alpha", "alpha.py")
        database, days = self.database()
        database.add_starts(dict.fromkeys(days, 5.0))
        database.add_counter("used", dict.fromkeys(days, 1.0), namespace="one")
        database.add_counter("used", dict.fromkeys(days[60:], 1.0), namespace="two")
        self.assertEqual(self.printed("--unused", "--at-most", "1"), "alpha\n")

    def test_after_a_counter_came_back_its_value_counts(self) -> None:
        database, days = self.database()
        database.add_starts(dict.fromkeys(days, 5.0))
        samples = dict.fromkeys(days[:40], 2.0) | dict.fromkeys(days[60:], 1.0)
        database.add_counter("alpha", samples)
        rows = json.loads(self.usage("--json").out)
        self.assertEqual(rows[0]["processes"], 1)

    def test_a_counter_of_which_some_is_used_may_end(self) -> None:
        self.install("alpha", "alpha.py")
        database, days = self.database()
        database.add_starts(dict.fromkeys(days, 5.0))
        rising = dict.fromkeys(days, 1.0) | dict.fromkeys(days[51:], 2.0)
        database.add_counter("used", rising, namespace="two")
        database.add_counter("used", dict.fromkeys(days[:40], 1.0), namespace="one")
        database.add_counter("not a name", dict.fromkeys(days[:40], 1.0))
        self.assertEqual(self.printed("--unused"), "alpha\n")
        self.assertEqual(self.usage("--at-most", "1").status, 1)

    def reach(self, begin: int, end: int, counted: int) -> str:
        """Return what usage says of an exporter that was scraped from a day to another.

        counted: the day from which on it had a counter
        """
        self.install("alpha", "alpha.py")
        database, days = self.database()
        database.add_starts(dict.fromkeys(days[begin:end], 5.0))
        rising = {when: 1.0 + number for number, when in enumerate(days[counted:end])}
        database.add_counter("other", rising)
        outcome = self.usage("--unused")
        if outcome.status == 0:
            self.assertEqual((outcome.out, outcome.err), ("alpha\n", ""))
        else:
            self.assertEqual((outcome.status, outcome.out), (1, ""))
        return outcome.err

    def test_the_counts_reach_back_as_far_as_exporters_and_popcon_were_there(
        self,
    ) -> None:
        self.assertEqual(self.reach(begin=0, end=101, counted=0), "")
        self.assertEqual(self.reach(begin=0, end=101, counted=1), "")
        young = "reach back 12d of 100d; try --window 12d\n"
        self.assertIn(young, self.reach(begin=88, end=101, counted=88))
        self.assertIn(young, self.reach(begin=0, end=101, counted=88))
        self.assertIn("reach back 0s of 100d\n", self.reach(begin=0, end=91, counted=0))

    def test_an_outage_of_a_tenth_of_a_short_window_is_no_answer(self) -> None:
        self.install("alpha", "alpha.py")
        database, _ = self.database()
        end = time.time()
        times = [
            end - 4000 + 60 * number for number in range(40)
        ]  # up to 27 minutes ago
        database.add_starts(dict.fromkeys(times, 5.0))
        rising = {when: 1.0 + number for number, when in enumerate(times)}
        database.add_counter("other", rising)
        outcome = self.usage("--window", "1h")
        self.assertEqual(outcome.status, 1)
        self.assertIn("reach back 0s of 1h\n", outcome.out)

    def test_an_outage_of_two_hours_in_a_long_window_is_forgiven(self) -> None:
        self.install("alpha", "alpha.py")
        database, _ = self.database()
        end = time.time() - 1.5 * 3600
        times = [end - 3600 * number for number in range(100, -1, -1)]
        database.add_starts(dict.fromkeys(times, 5.0))
        rising = {when: 1.0 + number for number, when in enumerate(times)}
        database.add_counter("other", rising)
        self.assertEqual(self.printed("--window", "3d", "--unused"), "alpha\n")

    def test_where_restarts_are_not_known_there_is_no_answer(self) -> None:
        self.install("alpha", "alpha.py")
        database, days = self.database()
        database.add_counter("other", dict.fromkeys(days, 9.0))
        sentence = "no process_start_time_seconds is stored for .*: scrape it, too, "
        self.assert_refused(sentence)
        # That one exporter tells of them does not help where another does not.
        database.add_starts(dict.fromkeys(days, 5.0), instance="y:9102")
        database.add_counter("alpha", dict.fromkeys(days, 9.0), instance="y:9102")
        self.assert_refused(sentence)

    def test_what_ended_before_the_window_need_not_tell_of_restarts(self) -> None:
        self.install("alpha", "alpha.py")
        database, days = self.database()
        database.add_starts(dict.fromkeys(days, 5.0))
        rising = {when: 1.0 + number for number, when in enumerate(days)}
        database.add_counter("other", rising)
        # A server may know its series for hours longer than the window.
        database.add_counter("old", {days[0] - DAY: 9.0}, instance="y:9102")
        self.assertEqual(self.printed("--unused"), "alpha\n")

    # Servers that answer oddly.

    def assert_answer_refused(
        self,
        sentence: str,
        body: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Prove that such an answer to the first question is refused with a sentence."""
        url = self.serve(lambda asked: (status, headers or {}, body))
        self.assert_refused(sentence, "--prometheus", url)

    def test_answers_that_are_not_prometheus_get_one_sentence(self) -> None:
        strange = (
            "does not answer as Prometheus does, but '.*or an exporter as --metrics"
        )
        page = b"<!DOCTYPE html><title>Log\33[2Jin</title>" * 100
        for body in (
            page,
            b"",
            b"[1, 2]",
            b"[" * 100000,
            b'{"data": [5]}',
            b'{"data": [{',
        ):
            self.assert_answer_refused(strange, body)

    def test_odd_samples_get_one_sentence(self) -> None:
        def answer_with(value: list[Any]) -> str:
            """Start a server that knows one counter, and has this value for it."""
            labels = {"library": "alpha", "job": "x\33"}
            series = json.dumps({"data": [labels]}).encode()
            result = [{"metric": labels, "value": value}]
            samples = json.dumps({"data": {"result": result}}).encode()
            return self.serve(
                lambda asked: (200, {}, series if "/series" in asked else samples)
            )

        strange = "does not answer as Prometheus does"
        self.assert_refused(strange, "--prometheus", answer_with([1, []]))
        self.assert_refused(strange, "--prometheus", answer_with([1, None]))
        for value in ([1, "NaN"], [math.nan, "1"], [1e300, "1"], [1, "Inf"]):
            self.assert_refused(
                "no count of .* rose in 90d", "--prometheus", answer_with(value)
            )

    def test_what_is_no_number_is_no_sample(self) -> None:
        values = [[1, "NaN"], [2, "3"], [3, "+Inf"], [1e300, "4"], [5, "-Inf"]]
        series = {"metric": {"__name__": "x", "job": 1}, "values": values}
        found = dict(popcon.series_in({"result": [series]}))
        labels = frozenset({("__name__", "x"), ("job", "1")})
        self.assertEqual(found, {labels: [(2.0, 3.0)]})

    def test_what_a_server_does_not_know_is_told(self) -> None:
        none = "no count of .* rose in 90d: do "
        self.assert_answer_refused(none, b'{"data": []}')
        self.assert_answer_refused(none, b'{"data": [], "warnings": []}')
        lost = b'{"data": [], "warnings": ["a store is out"]}'
        self.assert_answer_refused("does not know all: a store is out", lost)

    def test_what_a_server_says_is_wrong_is_told_without_its_json(self) -> None:
        wrong = '{"error":"parse error: \\"\u00e4\\""}'.encode()
        self.assert_answer_refused('answers 400 .*: parse error: "\u00e4"$', wrong, 400)
        self.assert_answer_refused("answers 401 Unauthorized$", b"<html>", 401)
        self.assert_answer_refused("answers 503 Service Unavailable$", b"[]", 503)
        # It follows no redirect, as a header may hold a secret.
        moved = {"Location": "https://login.example/?hunter2"}
        self.assert_answer_refused("/series answers 302 Found$", b"", 302, moved)
        exporter = "answers 404 Not Found: give Prometheus by its base URL, or an "
        exporter += "exporter as --metrics URL$"
        self.assert_answer_refused(exporter, b"404", 404)

    def test_answers_that_are_cut_off_get_one_sentence(self) -> None:
        length = {"Content-Length": "9"}
        chunked = {"Transfer-Encoding": "chunked"}
        self.assert_answer_refused("cannot be read: .*cut off", b"{", headers=length)
        cut = "cannot be read: .*(cut off|Incomplete)"
        self.assert_answer_refused(cut, b"ff\r\n{", headers=chunked)
        self.assert_answer_refused("cannot be read: ", b"no size", 503, chunked)

    def test_a_header_is_sent_and_never_told(self) -> None:
        lines = "Authorization: Bearer hunter2\r\n\nX-Two: b\n"
        self.write(self.folder, {"secret.txt": lines})
        for secret in (
            "Authorization: Bearer hunter2",
            f"@{self.folder / 'secret.txt'}",
        ):
            url = self.serve(lambda asked: (400, {}, b'{"error": "wrong"}'))
            given = ("--header", "X-Scope-OrgID: a", "--header", secret)
            self.assert_refused(
                "answers 400 .*wrong$", "--prometheus", f"{url}/tenant/", *given
            )
            ((path, headers),) = self.asked
            self.assertTrue(path.startswith("GET /tenant/api/v1/series?"), path)
            self.assertEqual(headers["Authorization"], "Bearer hunter2")
            self.assertEqual(headers["X-Scope-Orgid"], "a")

    # Wrong arguments.

    def test_a_source_is_required_and_only_one(self) -> None:
        self.assert_refused("one of the arguments --prometheus --metrics is required")
        self.count(x=1)
        self.assert_refused("not allowed with argument", "--prometheus", "http://x")
        self.assert_refused("not allowed with argument", "--unused", "--json")

    def test_wrong_urls_get_one_sentence(self) -> None:
        for url in ("localhost:9090", "file:///etc/hunter2", "x"):
            self.assert_refused("a URL must be as http://", "--prometheus", url)
        sentence = "a URL must be as http://host:9102/metrics, of ASCII characters wi"
        for place in ("x/?hunter2 x", "x/?hunter2\u20ac", "x?hunter2", "/x"):
            self.assert_refused(sentence, "--metrics", f"http://{place}")
        for url in ("http://x/p?tenant=hunter2", "http://x?hunter2", "http://x/#hunter2"):
            without = "--prometheus: it must be a base URL, without . and what follows"
            self.assert_refused(without, "--prometheus", url)
        password = "a password is given as --header @FILE, not in the URL"
        for url in ("http://user:hunter2@x:9090", "user:hunter2@x:9090"):
            self.assert_refused(password, "--prometheus", url)
        self.assert_refused(
            "cannot be read: nonnumeric port", "--prometheus", "http://x:y"
        )
        nowhere = f"http://127.0.0.1:{free_port()}"
        self.assert_refused("cannot be read: .*refused$", "--prometheus", nowhere)
        odd = {"NO_PROXY": "", "http_proxy": "socks5://127.0.0.1:9"}
        sentence = "cannot be read: unknown url type: socks5$"
        self.assert_refused(sentence, "--prometheus", nowhere, environ=odd)

    def test_wrong_windows_get_one_sentence(self) -> None:
        self.count(x=1)
        unit = "--window: '.*' must be a whole number above 0 with a unit, such as 90d or 12h"
        for text in (
            "",
            "90",
            "d",
            "1.5d",
            "5 d",
            "0d",
            "1h30m",
            "9999999999d",
            "-1d",
            "\u0663d",
        ):
            self.assert_refused(unit, f"--window={text}")

    def test_wrong_numbers_get_one_sentence(self) -> None:
        self.count(x=1)
        for text in ("-1", "few", "1.5", "", "\u00b2"):
            self.assert_refused("must be a whole number from 0 up", f"--at-most={text}")
            self.assert_refused("must be a whole number from 0 up", f"--at-least={text}")

    def test_a_match_that_cannot_be_taken_gets_one_sentence(self) -> None:
        match = "{a='b'}"
        self.count(x=1)
        self.assert_refused("--match is for --prom", "--match", match)
        self.source = ("--prometheus", "http://127.0.0.1:9")
        for match in ("{}x", '{a="b"', "x{}"):
            self.assert_refused("must be as in PromQL: '{nam", "--match", match)
        for match in (
            '{library="numpy"}',
            '{ library =~ "a.*" }',
            "{a='b',library!~`x`}",
            '{"library"!="x"}',
            "{'library' = 'x'}",
            '{job="x\\"",library="numpy"}',
            '{job="x", library = "numpy"}',
        ):
            self.assert_refused("must be about other labels", "--match", match)

    def test_wrong_headers_get_one_sentence(self) -> None:
        self.source = ("--prometheus", "http://127.0.0.1:9")
        bad = self.folder / "bad.txt"
        bad.write_text("hunter2\n")
        for text in ("hunter2", "X: hunter2\u20ac", "a b: hunter2", f"@{bad}"):
            self.assert_refused("must be 'Name: value', or @FILE", "--header", text)
        missing = "(?=.*No such file or directory).*/nope"
        self.assert_refused(missing, "--header", "@/nope")

    def test_a_wrong_prefix_gets_one_sentence(self) -> None:
        wrong = {"PYTHON_POPCONTEST_STATSD_PREFIX": "a b"}
        sentence = "PYTHON_POPCONTEST_STATSD_PREFIX='a b': must"
        self.count(x=1)
        self.assert_refused(sentence, environ=wrong)


class TestUsageOfRealThings(UsageCase):
    def real_server(self, path: str, *ports: int) -> str:
        """Start a server that scrapes these ports each second, and return its address."""
        folder = self.folder / f"server-{free_port()}"
        address = f"127.0.0.1:{free_port()}"
        targets = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
        scrape = {
            "job_name": "popcon",
            "scrape_interval": "1s",
            "static_configs": targets,
        }
        self.write(folder, {"config.yml": json.dumps({"scrape_configs": [scrape]})})
        names = ["config.file", "storage.tsdb.path", "web.listen-address"]
        if path == VICTORIAMETRICS:
            names = ["promscrape.config", "storageDataPath", "httpListenAddr"]
        values = [folder / "config.yml", folder / "data", address]
        self.start(path, *(f"--{name}={value}" for name, value in zip(names, values)))
        return f"http://{address}"

    def wait_for_scrapes(self, urls: list[str]) -> None:
        """Wait until the servers tell of both exporters what they showed a second ago."""
        begin = time.time()
        query = f"count(timestamp(up) > {begin + 1} and up == 1) == 2"
        for url in urls:
            asked = f"{url}/api/v1/query?" + urllib.parse.urlencode(
                {"query": query, "nocache": 1}
            )
            found = False
            while not found:
                self.assertLess(time.time(), begin + 60, f"{url} does not scrape")
                time.sleep(0.3)
                with (
                    contextlib.suppress(OSError),
                    urllib.request.urlopen(asked) as answer,
                ):
                    found = bool(json.load(answer)["data"]["result"])

    def use(self, port: int, *names: str, space: str = "") -> None:
        """Count libraries as used, perhaps in a namespace."""
        prefix = "python_popcon.library_used"
        if space:
            prefix = f"python_popcon.namespace.{space}.library_used"
        lines = [popcon.statsd_line(name, prefix) for name in names]
        popcon.send(lines, "127.0.0.1", port)

    @unittest.skipUnless(
        EXPORTER and SERVERS, "needs POPCON_TEST_STATSD_EXPORTER and servers"
    )
    def test_real_servers_give_exact_counts_whatever_restarts(self) -> None:
        self.install_all(
            "before", "again", "once", "twice", "everywhere", "spaces", "never"
        )
        other, port = self.open(self.exporter())[1].place
        with self.exporter() as (_, metrics):
            first = metrics.place
            urls = [self.real_server(path, first[1], port) for path in SERVERS]
            self.use(first[0], "before", "again")
            self.use(first[0], "before", space="prod")
            self.use(other, "before")
            self.wait_for_scrapes(urls)
            start = time.time()
            # The outage that is forgiven is a tenth of the window, and scrapes take time.
            time.sleep(45)
            self.use(first[0], "again", "once", "twice", "everywhere")
            self.use(other, "everywhere")
            self.use(first[0], "spaces", space="prod")
            self.use(first[0], "spaces", "spaces", space="test")
            self.wait_for_scrapes(urls)
        self.open(self.exporter(first))
        self.wait_for_scrapes(urls)
        self.use(first[0], "twice")
        self.wait_for_scrapes(urls)
        # These counters ended with the first exporter, and that is an outage soon.
        for url, path in zip(urls, SERVERS):
            with self.subTest(server=path):
                since = self.since(url, start)
                in_prod = self.processes(*since, "--match", '{namespace="prod"}')
                self.assertEqual(in_prod, {"spaces": 1})
        for url, path in zip(urls, SERVERS):
            with self.subTest(server=path):
                self.check_server(url, start)

    def since(self, url: str, start: float) -> tuple[str, ...]:
        """Return the options that ask a server about the time since the start."""
        window = f"{(time.time() - start) * 1000:.0f}ms"
        return ("--prometheus", url, "--window", window)

    def check_server(self, url: str, start: float) -> None:
        """Prove that a server gives the true answers about the time since the start."""
        since = self.since(url, start)
        expected = {"again": 1, "once": 1, "twice": 2, "everywhere": 2, "spaces": 3}
        self.assertEqual(self.processes(*since), expected)
        self.assertEqual(self.printed(*since, "--unused"), "before\nnever\n")
        outcome = self.usage("--prometheus", url, "--unused")
        self.assertEqual((outcome.status, outcome.out), (1, ""))
        self.assertRegex(
            outcome.err, r"reach back \d+[sm] of 90d; try --window \d+[sm]\n"
        )
        nothing = (*since, "--match", '{x="y"}')
        self.assert_refused("no count of .* rose", *nothing)
        self.assert_refused("answers (400|422) .*:", *since, "--match", '{x=~"("}')

    @unittest.skipUnless(EXPORTER, "needs POPCON_TEST_STATSD_EXPORTER")
    def test_a_real_exporter_given_as_something_else_gets_one_sentence(self) -> None:
        port = self.open(self.exporter())[1].place[1]
        url = f"http://127.0.0.1:{port}"
        self.assert_refused(
            "give Prometheus by its base URL, or an exporter as --metrics", "--prometheus", url
        )
        self.assert_refused("no exporter's /metrics", "--metrics", url)

    def run_large(self, code: str, *arguments: str) -> str:
        """Run code in the large environment, and return what it prints."""
        ended = self.run_python(
            code, "-W", "ignore", python=LARGE, arguments=[*arguments]
        )
        self.assertEqual(ended.returncode, 0, ended.stderr)
        self.assertIn(ended.stderr, ("", ONLY_SESSIONS))
        return ended.stdout

    @unittest.skipUnless(
        LARGE, "needs POPCON_TEST_LARGE, the python of a large environment"
    )
    def test_nothing_that_stays_needs_what_can_go_in_a_large_environment(self) -> None:
        names = ("pandas", "scikit-learn", "matplotlib", "requests", "spacy")
        counts: Any = dict.fromkeys(names, 1)
        self.count(**counts)
        lists = []
        for before in ("pass", "popcon.setup_reporter()"):
            code = f"import popcon; {before}; popcon.main()"
            rows = json.loads(self.run_large(code, "usage", *self.source, "--json"))
            self.assertGreater(len(rows), 500)
            lists.append([row["library"] for row in rows if row["status"] == "unused"])
        self.assertGreater(len(lists[0]), 20)
        # Where all report, commands can be judged.
        self.assertLess(set(lists[0]), set(lists[1]))
        self.run_large(STAYS, json.dumps(lists))


# ---- README -------------------------------------------------------------------------

GRAFANA = os.environ.get("POPCON_TEST_GRAFANA", "")


def inline_code() -> list[str]:
    """Return what stands between backticks in README, but for the blocks of code."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", README)
    return re.findall(r"`([^`\n]+)`", text)


def moved(text: str, ports: dict[str, int]) -> str:
    """Return README's text with other ports than those it names."""
    for shown, port in ports.items():
        text = re.sub(rf"\b{shown}\b", str(port), text)
    return text


def commands_of_popcon() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each of popcon's commands."""
    for action in popcon.command_line()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("popcon has no commands")


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return a command's options, as -m and --match; --help is every command's."""
    options = set()
    for action in parser._actions:
        if action.option_strings:
            options.add(max(action.option_strings, key=len))
    return options - {"--help"}


class TestReadmeIsComplete(unittest.TestCase):
    def test_it_has_at_most_400_lines(self) -> None:
        self.assertLessEqual(len(README.splitlines()), 400)

    def test_it_shows_each_command_with_each_of_its_options(self) -> None:
        code = "\n".join(inline_code() + readme_blocks("sh"))
        for command, parser in commands_of_popcon().items():
            start = rf"(?m)(?:^|popcon(?:\.py)? ){command}"
            shown = "\n".join(re.findall(rf"{start}\b.*", code))
            self.assertTrue(shown, command)
            if command == "usage":
                continue  # it has a table
            for option in options_of(parser):
                with self.subTest(command=command, option=option):
                    self.assertRegex(shown, rf"(?<![\w-]){option}(?![\w-])")

    def test_its_table_of_options_has_those_of_usage_and_no_other(self) -> None:
        there = options_of(commands_of_popcon()["usage"])
        rows = re.findall(r"(?m)^\| (`--.*?) \|", README)
        self.assertEqual(set(re.findall(r"`(--[\w-]+)", "".join(rows))), there)

    def test_its_table_of_settings_has_each_with_its_default(self) -> None:
        rows = dict(re.findall(r"(?m)^\| `([A-Z_]+)` \| (.+?) \|", README))
        source = SOURCE.read_text(encoding="utf-8")
        there = re.findall("PYTHON_POPCONTEST_[A-Z_]*[A-Z]", source)
        self.assertEqual(set(rows), {"DO_NOT_TRACK", *there})
        for name, shown in rows.items():
            default = ""
            if name in popcon.SETTINGS:
                with mock.patch.dict(os.environ, {name: ""}):
                    default = popcon.setting(name)
            self.assertEqual(shown, f"`{default}`" if default else "none")
            self.assertIn(name, popcon.__doc__ or "")

    def test_its_reasons_are_those_that_are_printed(self) -> None:
        _, _, section = README.partition("| reason |")
        rows = re.findall(r"(?m)^\| (`.*?) \|", section.partition("\n\n")[0])
        reasons = re.findall("`(.+?)`", "".join(rows))
        self.assertGreater(len(reasons), 14)
        source = SOURCE.read_text(encoding="utf-8")
        for reason in reasons:
            self.assertTrue(reason.removesuffix("NAME") in source, reason)

    def test_each_block_of_code_has_a_test(self) -> None:
        # The datagram and the sample table; what the tests below run, in this order.
        languages = Counter(re.findall(r"(?m)^ *```(\w+)$", README))
        tested = {
            "text": 2,
            "sh": 6,
            "ini": 1,
            "python": 2,
            "yaml": 3,
            "json": 1,
        }
        self.assertEqual(languages, tested)

    def test_the_tests_that_it_names_exist(self) -> None:
        names = re.findall(r"\btest_popcon\.(Test[\w.]+)", README)
        self.assertGreater(len(names), 2)
        for name in names:
            found: object = sys.modules[__name__]
            for part in name.split("."):
                found = getattr(found, part)

    def test_it_says_how_long_the_part_is_that_runs_in_peoples_processes(self) -> None:
        (shown,) = re.findall("about ([0-9,]+) lines", README)
        source = SOURCE.read_text(encoding="utf-8")
        core, _, _ = source.partition("# ---- the command line")
        number = len(core.splitlines())
        self.assertLess(abs(number - int(shown.replace(",", ""))), number / 10)


class TestReadme(Case):
    def run_in_shell(
        self,
        script: str,
        *arguments: str,
        folder: Path | None = None,
        programs: Path | None = None,
        **settings: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a script for bash in a folder, with the programs of a further folder."""
        path = os.environ["PATH"]
        if programs is not None:
            path = f"{programs}{os.pathsep}{path}"
        environ = clean_environ(PATH=path, PYTHONPATH="", NO_PROXY="*", COLUMNS="80")
        command = ["timeout", "-sKILL", "110", "bash", "-c", script, "bash", *arguments]
        return subprocess.run(
            command,
            cwd=folder or self.own,
            env=environ | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def environment(self) -> Path:
        """Make a virtual environment, and return the folder of its programs."""
        folder = self.folder / "environment"
        venv.create(folder, symlinks=True)
        return folder / "bin"

    # What it is, and the quick start.

    def test_the_commands_of_a_fresh_machine_succeed(self) -> None:
        for file in (SOURCE, HERE / "test_popcon.py", HERE / "README.md"):
            shutil.copy(file, self.own)
        script = readme_block("sh", "python3 popcon.py selftest")
        # Of the tests not all once more, but two that are skipped, and one that is not.
        some = "unittest -k test_the_dashboard -k test_an_extension_has_an_owner"
        script = script.replace("unittest", some)
        ended = self.run_in_shell(f"set -e\n{script}", programs=self.environment())
        self.assertEqual(ended.returncode, 0, ended.stdout)
        self.assertRegex(ended.stdout, "(?m)^ok +reporting ")
        self.assertRegex(ended.stdout, "Skipped:\n +2 tests: needs POPCON_TEST_GRAFANA")

    def test_the_sample_of_the_answer_has_the_sections_of_the_real_one(self) -> None:
        _, sample = readme_blocks("text")
        titles = re.findall(r"(?m)^(\w[^(\n]*) \(\d+", sample)
        self.assertGreater(len(titles), 4)
        self.install("needed", "needed.py")
        requires = "Metadata-Version: 2.1\nName: often\nRequires-Dist: needed\n"
        self.install("often", "often.py", more={"METADATA": requires})
        self.install("seldom", "seldom.py")
        requires = "Metadata-Version: 2.1\nName: never\nRequires-Dist: stubs\n"
        self.install("never", "never.py", more={"METADATA": requires})
        self.install("stubs", "never-stubs/__init__.pyi")
        lines = ["process_start_time_seconds 1"]
        for library, count in ("often", 9), ("seldom", 4), ("elsewhere", 1):
            lines.append(f'python_popcon_library_used{{library="{library}"}} {count}')
        metrics = self.folder / "metrics.txt"
        metrics.write_text("\n".join([*lines, ""]))
        code = """
            import popcon, sys
            sys.path[:] = [sys.argv.pop(1)]
            popcon.main()
            """
        usage = ["usage", "--metrics", str(metrics), "--at-most", "4"]
        ended = self.run_python(code, arguments=[str(self.site), *usage])
        self.assertEqual(ended.returncode, 0, ended.stderr)
        for title in titles:
            self.assertRegex(ended.stdout, rf"(?m)^{re.escape(title)} \(\d+")
        for words in (
            "Window: 90d; counted since",
            "from your list of requirements.",
            "that reported has imported them since",
            "and nothing that stays needs them.",
            "Rebuilding without these names also drops",
            "which only came along with them. Some may be in use: add those you need "
            "to requirements.txt.",
        ):
            self.assertIn(words, " ".join(sample.split()))
            self.assertIn(words, " ".join(ended.stdout.split()))

    def test_the_quick_start_leads_from_one_file_to_a_table(self) -> None:
        shutil.copy(SOURCE, self.own)
        port = free_port(socket.SOCK_DGRAM)
        script = readme_block("sh", "python3 -m venv")
        script = script.replace("collect", f"collect --listen 127.0.0.1:{port}")
        ended = self.run_in_shell(
            "trap 'kill -9 $(jobs -p) 2> /dev/null' EXIT\n" + script,
            programs=self.environment(),
            PYTHON_POPCONTEST_STATSD_PORT=str(port),
        )
        self.assertEqual(ended.returncode, 1, ended.stdout)  # as it is too early
        self.assertRegex(ended.stdout, r"(?m)^ *pip +[\d.]+ MB +1  #")
        self.assertIn("No answer yet", ended.stdout)

    def test_the_unit_for_systemd_starts_a_command_that_collects(self) -> None:
        unit = configparser.RawConfigParser()
        unit.read_string(readme_block("ini", "[Service]"))
        python, file, *arguments = shlex.split(unit["Service"]["ExecStart"])
        self.assertEqual(Path(file).name, "popcon.py")
        options = popcon.command_line().parse_args(arguments)
        self.assertIs(options.command, popcon.collect)

    # Switch it on.

    def test_the_lines_for_a_dockerfile_switch_it_on(self) -> None:
        shutil.copy(SOURCE, self.own)
        self.assertIn("COPY popcon.py /tmp/", inline_code())
        (line,) = (code for code in inline_code() if code.startswith("RUN "))
        command = line.removeprefix("RUN ")
        command = command.replace("/tmp/popcon.py", str(self.own / "popcon.py"))
        ended = self.run_in_shell(command, programs=self.environment())
        self.assertEqual(ended.returncode, 0, ended.stdout)
        self.assertRegex(ended.stdout, "(?m)^ok +reporting .*popcon-selftest:1")

    def test_python_in_its_text_can_be_run(self) -> None:
        spawner = types.SimpleNamespace(environment={})
        names = {"c": types.SimpleNamespace(Spawner=spawner), "popcon": popcon}
        starts = ("c.Spawner", "import os", "import popcon")
        lines = [line for line in inline_code() if line.startswith(starts)]
        self.assertGreater(len(lines), 3)
        with (
            mock.patch.dict(os.environ),
            mock.patch.object(popcon, "report"),
            mock.patch.object(popcon, "setup_reporter"),
        ):
            for line in lines:
                exec(line, names)
            self.assertTrue(popcon.opted_out())
        with mock.patch.dict(os.environ, spawner.environment):
            self.assertTrue(popcon.setting(popcon.HOST))

    # For those who must approve it.

    def test_it_shows_the_start_up_files_that_install_writes(self) -> None:
        shutil.copy(SOURCE, self.own)
        programs = self.environment()
        command = "set -e; python popcon.py install --all-processes"
        ended = self.run_in_shell(command, programs=programs)
        self.assertEqual(ended.returncode, 0, ended.stdout)
        written = []
        for name in ("000-popcon.py", "popcon.pth"):
            (path,) = programs.parent.rglob(name)
            written += without_comments(path.read_text())
        shown = readme_block("python", "# etc/ipython/startup/000-popcon.py")
        self.assertEqual(without_comments(shown), written)

    def test_nothing_is_read_if_nothing_may_be_sent(self) -> None:
        code = f"import popcon; popcon.setup_reporter()\nimport {REAL}\n{WATCH}\n"
        code += "sys.addaudithook(watch)"
        self.install("gamma", "gamma.py")
        port = str(free_port(socket.SOCK_DGRAM))
        host = {popcon.HOST: "no-such-host.invalid"}
        cases: list[tuple[dict[str, Any], bool]] = [
            ({}, False),
            ({popcon.HOST: ""}, False),
            (host | {"DO_NOT_TRACK": "1"}, False),
            (host | {popcon.SAMPLE_RATE: "0.0000000001"}, False),
            (host | {popcon.PORT: "no port"}, False),
            ({popcon.HOST: "127.0.0.1", popcon.PORT: port}, True),
        ]
        for settings, is_read in cases:
            with self.subTest(settings):
                ended = self.run_python(code, **settings)
                self.assertEqual(ended.returncode, 0, ended.stderr)
                self.assertEqual(ended.stderr != "", is_read, ended.stderr)

    def test_the_line_for_mpi_lets_one_rank_report(self) -> None:
        (line,) = (code for code in inline_code() if code.startswith('[ "${OMPI'))
        for variable in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
            for rank, opted_out in (("0", ""), ("1", "1")):
                with self.subTest(variable, rank=rank):
                    script = f"set -e\n{line}\necho $DO_NOT_TRACK"
                    ended = self.run_in_shell(f"export {variable}={rank}\n{script}")
                    self.assertEqual(ended.returncode, 0)
                    self.assertEqual(ended.stdout, f"{opted_out}\n")
        ended = self.run_in_shell(f"{line}\necho $DO_NOT_TRACK")
        self.assertEqual(ended.stdout, "\n")
        # In a batch job of Slurm, its variable is 0 for all ranks of mpiexec.
        variables = "export SLURM_PROCID=0 PMI_RANK=1"
        ended = self.run_in_shell(f"{variables}\n{line}\necho $DO_NOT_TRACK")
        self.assertEqual(ended.stdout, "1\n")

    # Collect, and the answer.

    @unittest.skipUnless(YAML, "needs POPCON_TEST_PYTHON_YAML, a python with PyYAML")
    def test_the_values_for_zero_to_jupyterhub_set_what_is_right(self) -> None:
        code = """
            import sys, yaml
            values = yaml.safe_load(sys.argv[1])
            (rule,) = values["singleuser"]["networkPolicy"]["egress"]
            assert rule["ports"] == [{"port": 9125, "protocol": "UDP"}], rule
            print(values["hub"]["extraConfig"]["popcon"])
            """
        values = readme_block("yaml", "hub:")
        ended = self.run_python(code, python=YAML, arguments=[values])
        self.assertEqual((ended.returncode, ended.stderr), (0, ""))
        spawner = types.SimpleNamespace(environment={})
        with mock.patch.dict(os.environ, {"POD_NAMESPACE": "physics"}):
            exec(ended.stdout, {"c": types.SimpleNamespace(KubeSpawner=spawner)})
        with mock.patch.dict(os.environ, spawner.environment):
            self.assertTrue(popcon.setting(popcon.HOST))
            prefix = popcon.setting(popcon.PREFIX)
        self.assertEqual(prefix, "python_popcon.namespace.physics.library_used")

    @unittest.skipUnless(
        EXPORTER and PROMETHEUS[0],
        "needs POPCON_TEST_STATSD_EXPORTER and POPCON_TEST_PROMETHEUS, real servers",
    )
    def test_its_servers_lead_to_a_table_and_its_promql_to_the_counts(self) -> None:
        for prometheus in PROMETHEUS:
            with self.subTest(prometheus):
                self.check_servers(prometheus)

    def check_servers(self, prometheus: str) -> None:
        place = Path(self.open(tempfile.TemporaryDirectory(dir=self.folder)))
        (place / "bin").mkdir()
        (place / "bin" / "statsd_exporter").symlink_to(EXPORTER)
        (place / "bin" / "prometheus").symlink_to(prometheus)
        ports = {
            "9125": free_port(socket.SOCK_DGRAM),
            "9102": free_port(),
            "9090": free_port(),
        }
        scraping = readme_block("yaml", "scrape_configs:").replace("1m", "1s")
        files = {
            "mapping.yml": readme_block("yaml", "mappings:"),
            "prometheus.yml": moved(scraping, ports),
        }
        self.write(place, files)
        url = f"http://127.0.0.1:{ports['9090']}"
        servers = self.run_servers(readme_block("sh", "statsd_exporter"), place, ports)
        self.wait_for_answer(url, "up == 1")
        popcon.send([f"{PREFIX}alpha:1|c".encode()], "127.0.0.1", ports["9125"])
        self.wait_for_answer(url, "python_popcon_library_used")
        usage = self.run_in_shell(f"{sys.executable} {SOURCE} usage --prometheus {url}")
        self.assertEqual(usage.returncode, 1, usage.stdout)
        self.assertIn("No answer yet", usage.stdout)
        # By hand, as README tells it.
        for panel in json.loads(readme_block("json", "{"))["panels"]:
            if panel["type"] == "table":
                query = panel["targets"][0]["expr"]
                for value, variable in re.findall("`([^`]+)` for `([$][^`]+)`", README):
                    query = query.replace(variable, value)
                self.assertNotIn("$", query)
                self.assertEqual(answered(url, query), {"alpha": 1})
        servers.kill()

    def run_servers(
        self, script: str, folder: Path, ports: dict[str, int]
    ) -> subprocess.Popen[bytes]:
        """Start README's servers in a folder, and end them with the test."""
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        servers = subprocess.Popen(
            ["bash", "-c", moved(script, ports) + "wait"],
            cwd=folder,
            env=clean_environ(PATH=path),
            start_new_session=True,
        )
        self.addCleanup(servers.wait)
        self.addCleanup(os.killpg, servers.pid, signal.SIGKILL)
        return servers

    def wait_for_answer(self, url: str, query: str) -> None:
        """Wait until a Prometheus has an answer to a query."""
        self.wait_until(lambda: answered(url, query))
        self.assertTrue(answered(url, query), query)

    def test_its_other_commands_are_understood(self) -> None:
        code = "\n".join(inline_code() + readme_blocks("sh"))
        start = r"\bpython (?:-m popcon|\S*popcon\.py)"
        commands = re.findall(rf"{start} ([^;&|>\n]+)", code)
        self.assertGreater(len(commands), 9)
        for command in commands:
            with self.subTest(command):
                # It exits if it is wrong.
                popcon.command_line().parse_args(shlex.split(command))


def without_comments(code: str) -> list[str]:
    """Return the lines of code, but for those that are comments."""
    return [line for line in code.splitlines() if not line.startswith("#")]


def data_of(url: str, path: str, form: dict[str, object]) -> Any:
    """Return the data that Prometheus answers to a question."""
    question = urllib.parse.urlencode(form)
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{question}", timeout=5) as answer:
        return json.load(answer)["data"]


def answered(url: str, query: str, **form: object) -> dict[str, float]:
    """Return the values that Prometheus answers to an instant query, by library."""
    result = data_of(url, "query", {"query": query, **form})["result"]
    return {one["metric"].get("library", ""): float(one["value"][1]) for one in result}


def use(
    settings: dict[str, Any], library: str, times: int = 1, namespace: str = ""
) -> None:
    """Send what so many processes send that used a library."""
    prefix = "python_popcon.library_used"
    if namespace:
        prefix = f"python_popcon.namespace.{namespace}.library_used"
    lines = [popcon.statsd_line(library, prefix)] * times
    popcon.send(lines, "127.0.0.1", int(settings[popcon.PORT]))


class TestDashboard(Case):
    """README's dashboard for Grafana, without Grafana."""

    def setUp(self) -> None:
        super().setUp()
        self.text = readme_block("json", "{")
        self.dashboard = json.loads(self.text)

    def complaints(self, text: str) -> str:
        """Return what Grafana's own SDK finds wrong in a dashboard, parsed strictly."""
        ended = subprocess.run([GRAFANA], input=text, capture_output=True, text=True)
        return ended.stderr

    @unittest.skipUnless(GRAFANA, "needs POPCON_TEST_GRAFANA, made of .ci/grafana.go")
    def test_the_dashboard_is_what_grafana_expects(self) -> None:
        self.assertEqual(self.complaints(self.text), "")
        self.assertLessEqual(len(self.text.splitlines()), 70)
        kinds = [panel["type"] for panel in self.dashboard["panels"]]
        self.assertEqual(kinds, ["stat", "bargauge", "table", "timeseries"])

    @unittest.skipUnless(GRAFANA, "needs POPCON_TEST_GRAFANA, made of .ci/grafana.go")
    def test_the_dashboard_would_be_refused_with_a_wrong_field_anywhere(self) -> None:
        for right in ("title", "refresh", "gridPos", "valueMode", "legendFormat"):
            with self.subTest(right):
                wrong = self.text.replace(f'"{right}":', f'"{right}s":', 1)
                self.assertIn(f"unexpected field '{right}s'", self.complaints(wrong))

    def test_its_panels_and_variables_read_the_source_that_is_chosen(self) -> None:
        source, *variables = self.dashboard["templating"]["list"]
        self.assertEqual(source["type"], "datasource")
        self.assertEqual(source["query"], "prometheus")
        chosen = {"type": "prometheus", "uid": "${" + source["name"] + "}"}
        for one in variables + self.dashboard["panels"]:
            self.assertEqual(one["datasource"], chosen)
        for panel in self.dashboard["panels"]:
            (target,) = panel["targets"]
            self.assertEqual(target["datasource"], chosen)
            is_trend = panel["type"] == "timeseries"
            self.assertEqual(target.get("instant", False), not is_trend)

    def filled_in(self, expression: str, **variables: str) -> str:
        """Return PromQL as Grafana sends it, with values for all variables."""
        for name, value in variables.items():
            expression = expression.replace(f"${name}", value)
        self.assertNotIn("$", expression)
        return expression

    @unittest.skipUnless(
        EXPORTER and PROMETHEUS[0],
        "needs POPCON_TEST_STATSD_EXPORTER and POPCON_TEST_PROMETHEUS, real servers",
    )
    def test_its_queries_give_the_right_numbers(self) -> None:
        for prometheus in PROMETHEUS:
            with self.subTest(prometheus), self.exporter() as (settings, metrics):
                self.check_queries(prometheus, settings, metrics.place[1])

    def check_queries(
        self, prometheus: str, settings: dict[str, Any], port: int
    ) -> None:
        url = self.scraped(prometheus, port)
        use(settings, "before")
        use(settings, "again", 5)
        self.wait_for(url, {"before": 1, "again": 5})
        begin = time.time()
        use(settings, "again", 2)
        use(settings, "once", namespace="prod")
        for number in range(30):
            use(settings, f"library-{number}", 3, namespace="test")
        sums = {"again": 7, "before": 1, "once": 1}
        sums |= {f"library-{number}": 3 for number in range(30)}
        self.wait_for(url, sums)
        now = time.time()
        expected = {name: count for name, count in sums.items() if name != "before"}
        expected["again"] = 2
        since_then = {"__range": f"{(now - begin) * 1000:.0f}ms"}
        all_of_them = since_then | {"namespace": ".*", "library": ".*"}
        count, most, table, trend = self.panels(url, now, **all_of_them)
        self.assertEqual(count, {"": 32})
        self.assertEqual(table, expected)
        self.assertEqual(list(table.values()), [3] * 30 + [2, 1])
        self.assertEqual(list(most.values()), [3] * 20)
        self.assertEqual(trend, sums)

        namespaces, libraries = self.values_of_variables(url, **all_of_them)
        self.assertEqual(namespaces, {"prod", "test"})
        self.assertEqual(libraries, set(sums))

        two = all_of_them | {"library": "once|library-1"}
        count, most, table, trend = self.panels(url, now, **two)
        self.assertEqual(table, expected)
        self.assertEqual(trend, {"once": 1, "library-1": 3})

        in_prod = all_of_them | {"namespace": "prod"}
        count, most, table, trend = self.panels(url, now, **in_prod)
        self.assertEqual(count, {"": 1})
        self.assertEqual([most, table, trend], [{"once": 1}] * 3)
        _, libraries = self.values_of_variables(url, **in_prod)
        self.assertEqual(libraries, {"once"})

    def values_of_variables(self, url: str, **chosen: str) -> list[set[str]]:
        """Return the values that Grafana offers for each variable with a query."""
        values = []
        for variable in self.dashboard["templating"]["list"]:
            if variable["type"] == "query":
                query = self.filled_in(variable["query"], **chosen)
                found = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
                assert found, query
                selector, label = found.groups()
                form = {"match[]": selector}
                values.append(set(data_of(url, f"label/{label}/values", form)))
        return values

    def scraped(self, prometheus: str, port: int) -> str:
        """Start a Prometheus that scrapes a port each second, and return its URL."""
        folder = Path(self.open(tempfile.TemporaryDirectory(dir=self.folder)))
        scraping = readme_block("yaml", "scrape_configs:").replace("1m", "1s")
        self.write(folder, {"prometheus.yml": moved(scraping, {"9102": port})})
        address = f"127.0.0.1:{free_port()}"
        self.start(
            prometheus,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        )
        return f"http://{address}"

    def wait_for(self, url: str, counts: dict[str, int]) -> None:
        """Wait until a Prometheus knows these sums of the counters."""
        query = "sum by (library) (python_popcon_library_used)"
        self.wait_until(lambda: answered(url, query) == counts)
        self.assertEqual(answered(url, query), counts)

    def panels(self, url: str, now: float, **variables: str) -> list[dict[str, float]]:
        """Return what the query of each panel gives."""
        answers = []
        for panel in self.dashboard["panels"]:
            query = self.filled_in(panel["targets"][0]["expr"], **variables)
            answers.append(answered(url, query, time=now))
        return answers


# ---- what can go --------------------------------------------------------------------

REMOVAL = os.environ.get("POPCON_TEST_REMOVAL", "")

# Tests of libraries that use many others if these are installed: paths in site-packages.
SUITES = (
    "networkx/readwrite",
    "pandas/tests/io/test_parquet.py pandas/tests/io/test_html.py "
    "pandas/tests/io/test_fsspec.py pandas/tests/io/test_gcs.py "
    "pandas/tests/io/excel/test_style.py pandas/tests/io/excel/test_openpyxl.py "
    "pandas/tests/io/excel/test_xlsxwriter.py",
    "xarray/tests/test_backends_api.py xarray/tests/test_backends_datatree.py",
    "sklearn/utils/tests/test_validation.py sklearn/utils/tests/test_dataframe.py",
)


class TestRemoval(Case):
    @unittest.skipUnless(REMOVAL, "needs POPCON_TEST_REMOVAL, a large python")
    def test_to_remove_all_that_can_go_breaks_no_test_of_real_libraries(self) -> None:
        self.environment = self.folder / "environment"
        shutil.copytree(
            Path(REMOVAL).parents[1],
            self.environment,
            symlinks=True,
            copy_function=link_or_copy,
        )
        self.run_in_it(str(SOURCE), "install", "--all-processes")
        with Server() as server:
            before = self.results_of_suites(**server.settings)
            names = server.names()
        self.assertGreater(len(before), 1000)
        lines = ["process_start_time_seconds 1"]
        for name, number in Counter(names).items():
            lines.append(f'python_popcon_library_used{{library="{name}"}} {number}')
        metrics = self.folder / "metrics.txt"
        metrics.write_text("\n".join([*lines, ""]))

        usage = ["-m", "popcon", "usage", "--metrics", str(metrics), "--unused"]
        unused = self.run_in_it(*usage)
        self.assertGreater(len(unused.split()), 20)
        self.run_in_it("-m", "pip", "uninstall", "--yes", *unused.split())

        after = self.results_of_suites()
        for test in before.keys() | after.keys():
            with self.subTest(test):
                self.assertEqual(after.get(test), before.get(test))

    def run_in_it(self, *arguments: str, **settings: str) -> str:
        """Run Python in the copy of the environment, and return what it prints."""
        ended = self.python_in_it(*arguments, **settings)
        self.assertEqual(ended.returncode, 0, ended.stdout + ended.stderr)
        return ended.stdout

    def python_in_it(
        self, *arguments: str, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        home = str(self.folder)
        settings = {
            "HOME": home,
            "PYTHONPATH": "",
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": f"{home}/bytecode",  # for both runs
            "PYTHONHASHSEED": "0",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "OMP_NUM_THREADS": "1",
        } | settings
        return subprocess.run(
            [self.environment / "bin" / "python", *arguments],
            cwd=self.own,
            env=clean_environ(**settings),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def results_of_suites(self, **settings: str) -> dict[tuple[str, str], list[str]]:
        """Run the suites, two at a time, and return what became of each test."""
        results = {}
        with ThreadPoolExecutor(2) as pool:
            for found in pool.map(self.results_of_suite, SUITES, repeat(settings)):
                results.update(found)
        return results

    def results_of_suite(
        self, suite: str, settings: dict[str, str]
    ) -> dict[tuple[str, str], list[str]]:
        (folder,) = (self.environment / "lib").glob("python*/site-packages")
        report = self.folder / f"report-{threading.get_ident()}.xml"
        ended = self.python_in_it(
            "-m",
            "pytest",
            "--quiet",
            "-pno:cacheprovider",
            "-mnot slow and not network and not single_cpu and not db",
            f"--junitxml={report}",
            *[str(folder / path) for path in suite.split()],
            **settings,
        )
        # With 1, tests have failed: some need programs that are not there.
        assert ended.returncode in (0, 1), ended.stdout + ended.stderr
        results: dict[tuple[str, str], list[str]] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            name = case.get("classname", ""), case.get("name", "")
            outcomes = results.setdefault(name, [])
            outcomes.append("ran")
            for outcome in case:
                outcomes.append(f"{outcome.tag} {outcome.get('type')}")
        return results


def link_or_copy(source: str, target: str) -> None:
    """Make a file another name of the same file, where one file system holds both."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# ---- at the end of all tests --------------------------------------------------------


class SuiteThatTellsWhatItSkipped(unittest.TestSuite):
    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        super().run(result, debug)
        reasons = Counter(reason for _, reason in result.skipped)
        atexit.register(tell_what_was_skipped, reasons)
        return result


def tell_what_was_skipped(reasons: Counter[str]) -> None:
    if reasons:
        print("\nSkipped:", file=sys.stderr)
    for reason, number in sorted(reasons.items()):
        tests = "test" if number == 1 else "tests"
        print(f"{number:4} {tests}: {reason}", file=sys.stderr)


def load_tests(
    loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None
) -> unittest.TestSuite:
    """Return all tests of this file, as `python -m unittest` asks for them."""
    return SuiteThatTellsWhatItSkipped([tests])


if __name__ == "__main__":
    unittest.main()
