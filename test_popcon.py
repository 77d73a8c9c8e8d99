"""The tests of popcon: `python -m unittest`. They follow the rooms of popcon.py.

Those that need a real server, a kernel, Debian's Python or a large environment are told where by
POPCON_TEST_* variables, as .ci/run sets them, and are skipped without.
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
import types
import unittest
import urllib.parse
import urllib.request
import venv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat, starmap
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import popcon

HERE = Path(__file__).resolve().parent
SOURCE = Path(popcon.__file__).resolve()
README = (HERE / "README.md").read_text(encoding="utf-8")
EXPORTER = os.environ.get("POPCON_TEST_STATSD_EXPORTER", "")
STATSD = os.environ.get("POPCON_TEST_STATSD", "")
LARGE = os.environ.get("POPCON_TEST_LARGE", "")
RELATIVES = os.environ.get("POPCON_TEST_RELATIVES", "")
JUPYTER = os.environ.get("POPCON_TEST_JUPYTER", "")
YAML = os.environ.get("POPCON_TEST_PYTHON_YAML", "")
DEBIAN = list(filter(None, os.environ.get("POPCON_TEST_DEBIAN", "").split(":")))
OLD_PYTHONS = list(filter(None, os.environ.get("POPCON_TEST_OLD_PYTHONS", "").split(":")))
PREFIX = "python_popcon.library_used."


def clean_environ(**settings: str) -> dict[str, str]:
    strange = ("PYTHON", "DO_NOT", "POPCON_TEST")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    return environ | {"PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"} | settings


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"(?ms)^ *```{language}\n(.*?)^ *```$", README)


def readme_block(language: str, start: str) -> str:
    (block,) = (block for block in readme_blocks(language) if block.startswith(start))
    return block


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def settings_for(port: int, address: str = "127.0.0.1") -> dict[str, Any]:
    return {"PYTHON_POPCONTEST_STATSD_HOST": address, "PYTHON_POPCONTEST_STATSD_PORT": str(port)}


class Server(socket.socket):
    """A statsd server that only listens."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__(family, socket.SOCK_DGRAM)
        self.bind((address, 0))
        self.port = self.getsockname()[1]
        self.settings = settings_for(self.port, address)

    def received(self, wait: float = 0.0) -> list[bytes]:
        """What came since the last call; loopback delivers before the sender goes on."""
        datagrams = []
        self.settimeout(wait)
        with contextlib.suppress(BlockingIOError, TimeoutError):
            while True:
                datagrams.append(self.recv(65536))
        return datagrams

    def names(self, wait: float = 0.0) -> list[str]:
        """The libraries that were counted since the last call, sorted, each as often as it was."""
        lines = [line for datagram in self.received(wait) for line in datagram.decode().split("\n")]
        for line in lines:
            assert re.fullmatch(r"python_popcon\.library_used\.[a-z0-9-]+:1\|c", line), line
        return sorted(line[len(PREFIX) : -len(":1|c")] for line in lines)

    def silences(self) -> str:
        """Code after which popcon takes this server, which never answers, for the name server."""
        files = {"/etc/resolv.conf": b"nameserver 127.0.0.1", "/etc/hosts": b""}
        return (
            f"import popcon; popcon.NAME_SERVER_PORT = {self.port}; _read = popcon.read\n"
            f"popcon.read = lambda path: {files}.get(path) or _read(path)\n"
        )


class Case(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(self.open(tempfile.TemporaryDirectory())).resolve()
        self.site = self.folder / "lib" / "site-packages"
        self.own = self.folder / "own"
        self.site.mkdir(parents=True)
        self.own.mkdir()

    def open(self, manager: Any) -> Any:  # TestCase.enterContext came with 3.11
        self.addCleanup(manager.__exit__, None, None, None)
        return manager.__enter__()

    def write(self, folder: Path, files: dict[str, str]) -> None:
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")

    def install(
        self, name: str, *files: str, folder: Path | None = None, record: str | None = "",
        info: str = "", more: dict[str, str] | None = None, source: str = "",
    ) -> Path:  # fmt: skip
        """Install a library of these files as pip does; record=None leaves the RECORD out."""
        folder = folder or self.site
        self.write(folder, dict.fromkeys(files, source))
        info = info or f"{re.sub('[-.]+', '_', name)}-1.0.dist-info"
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\nText\nName: not-me\n"
        meta = {f"{info}/{path}": made for path, made in {"METADATA": text, **(more or {})}.items()}
        self.write(folder, meta)
        if record == "":
            record = "".join(f"{path},sha256=abc,1\n" for path in [*meta, *files, f"{info}/RECORD"])
        if record is not None:
            self.write(folder, {f"{info}/RECORD": record})
        return folder / info

    def owners(self, *modules: str, folder: Path | None = None) -> set[str]:
        """What popcon says of modules, named by their paths in the folder."""
        folder = folder or self.site
        files = {str(folder / path) for path in modules}
        finder = importlib.machinery.FileFinder(str(folder))
        finder._path_cache = set(os.listdir(folder))  # type: ignore[attr-defined]
        with mock.patch.dict(sys.path_importer_cache, {str(folder): finder}):
            return {*popcon.owners(files)}

    def run_python(
        self, code: str, *flags: str, cwd: Path | None = None, python: str = sys.executable,
        arguments: list[str] | None = None, **settings: str,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run the code, or the script of that name, in a fresh Python that finds self.site."""
        path = os.pathsep.join([str(self.site), str(HERE)])
        program = [code] if code.endswith(".py") else ["-c", textwrap.dedent(code)]
        return subprocess.run(
            [python, *flags, *program, *(arguments or [])], cwd=cwd or self.own,
            env=clean_environ(**{"PYTHONPATH": path} | settings),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    def used(self, code: str, *flags: str, before: str = "", **options: Any) -> set[str]:
        """The libraries that a fresh interpreter names after it ran the code."""
        parts = ["import sys", textwrap.dedent(before), "import popcon; popcon.setup_reporter()"]
        parts += [textwrap.dedent(code), "print(*sorted(popcon.used_libraries()))"]
        result = self.run_python("\n".join(parts), *flags, **options)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        return set(result.stdout.split())

    def sent(self, code: str, *flags: str, **options: Any) -> tuple[list[str], str, str, int]:
        """The libraries that a program sends when it ends, what it printed, and its status."""
        if not code.endswith(".py"):
            code = "import popcon; popcon.setup_reporter()\n" + textwrap.dedent(code)
        with Server() as server:
            result = self.run_python(code, *flags, **server.settings | options)
            return server.names(0.0), result.stdout, result.stderr, result.returncode

    def start(self, *command: object) -> subprocess.Popen[bytes]:
        """Start a server in the test's folder; it ends with the test."""
        silent: Any = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
        process = subprocess.Popen([*map(str, command)], cwd=self.folder, **silent)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)  # which comes first
        return process

    def wait_until(self, holds: Callable[[], object], tries: int = 300) -> None:
        """Wait until it holds, and raises no OSError, a tenth of a second between the tries."""
        for _ in range(tries):
            with contextlib.suppress(OSError):
                if holds():
                    break
            time.sleep(0.1)

    @contextlib.contextmanager
    def exporter(self, place: tuple[int, int] = (0, 0)) -> Iterator[tuple[dict[str, Any], Any]]:
        """The real statsd_exporter: the settings for it, and a function that gives its metrics.

        Takes the ports for statsd and for the metrics, if it is to take another's place; they
        are the function's `place`.
        """
        self.write(self.folder, {"mapping.yaml": readme_block("yaml", "mappings:")})
        statsd, port = place if place[0] else (free_port(socket.SOCK_DGRAM), free_port())
        process = self.start(
            EXPORTER, f"--statsd.mapping-config={self.folder / 'mapping.yaml'}",
            f"--statsd.listen-udp=127.0.0.1:{statsd}", f"--web.listen-address=127.0.0.1:{port}",
            "--statsd.listen-tcp=", "--statsd.read-buffer=4194304",
        )  # fmt: skip

        def metrics() -> dict[str, float]:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
            samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
            return {name: float(value) for name, _, value in samples}

        metrics.place = statsd, port  # type: ignore[attr-defined]
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

    def expect(self, code: str, libraries: str, **options: str) -> None:
        """A fresh interpreter that runs the code counts these, named with spaces between."""
        with self.subTest(code=code, **options):
            self.assertEqual(self.used(code, **options), set(libraries.split()))

    def test_a_package_a_single_file_and_their_bytecode_alone_count(self) -> None:
        self.expect("import alpha.part, beta", "alpha beta")
        for path in list(self.site.rglob("*.py")):
            py_compile.compile(str(path), f"{path}c", doraise=True)
            path.unlink()
        self.expect("import alpha, beta", "alpha beta")

    def test_an_extension_counts(self) -> None:
        extension = f"twin/_csv{importlib.machinery.EXTENSION_SUFFIXES[0]}"
        self.install("twin", extension)
        self.assertEqual(self.owners(extension), {"twin"})
        original = getattr(sys.modules["_csv"], "__file__", "")
        if original:  # else it is built in
            shutil.copy(original, self.site / extension)
            self.expect("import twin._csv", "twin")
            by_hand = "import importlib.util as u; spec = u.find_spec('twin._csv'); "
            by_hand += "sys.modules['twin._csv'] = m = u.module_from_spec(spec); "
            self.expect(by_hand + "spec.loader.exec_module(m)", "twin")

    def test_names_are_normalised_as_pep_503_says(self) -> None:
        good = {"zope.event": "zope-event", "A__b-.c": "a-b-c", "PyYAML": "pyyaml", "2to3": "2to3"}
        bad = ["", "a b", "a:1|c\nb", "é", "\u212aafka", "-", "a/b", "²", "x" * 201]
        for name, expected in {**good, **dict.fromkeys(bad, "")}.items():
            self.assertEqual(popcon.normalized(name), expected)

    def test_only_libraries_that_own_the_imported_files_count(self) -> None:
        for path in ("google/cloud/storage", "google/cloud/bigquery", "google/auth"):
            self.install(path.replace("/", "-"), f"{path}/__init__.py")
        self.install("host", "host/__init__.py")
        self.install("guest", "host/plugins/guest.py", "guest_tool.py")
        self.install("opencv-python", "cv2/__init__.py")
        self.install("opencv-python-headless", "cv2/__init__.py")
        self.write(self.site, {"dropped.py": "", "host/dropped.py": ""})
        self.write(self.own, {"guest_tool.py": "", "mine/__init__.py": ""})
        self.expect("import google.cloud.storage", "google-cloud-storage")
        self.expect("import google.auth", "google-auth", before="import google.cloud.storage")
        self.expect("import host", "host")
        self.expect("import host.plugins.guest", "host guest")
        self.expect("import cv2", "opencv-python opencv-python-headless")
        self.expect("import dropped, host.dropped", "host")
        self.expect("sys.path.insert(0, ''); import guest_tool, mine", "")
        self.expect("import json, csv, decimal, sqlite3, xml.dom.minidom, concurrent.futures", "")
        self.assertEqual(popcon.executed_files({"by_another_name": os}), set())

    def test_source_trees_and_editable_installs_never_count(self) -> None:
        info = {"PKG-INFO": "Name: mine\n", "top_level.txt": "mine\n"}
        self.write(self.own, {f"mine.egg-info/{name}": text for name, text in info.items()})
        self.install("mine", "mine.py", folder=self.own, record=None, more=info)
        editable = {"direct_url.json": '{ "dir_info" :\n{ "editable" : true } }'}
        self.install("edited", "__editable___edited_finder.py", more=editable)
        self.install("copied", "copied.py", more={"direct_url.json": '{"dir_info": {}}'})
        self.expect("sys.path += ['']; import mine, __editable___edited_finder, copied", "copied")

    def test_lazy_modules_do_not_count_until_touched_and_stay_asleep(self) -> None:
        self.install("sleepy", "sleepy.py", source="value = 1; print('woken')")
        for load in (
            "sys.meta_path.insert(0, Finder); import sleepy",
            "sleepy = u.module_from_spec(spec); spec.loader.exec_module(sleepy)",
        ):
            asleep = textwrap.dedent(f"""
                import importlib.util as u
                spec = u.find_spec("sleepy")
                spec.loader = u.LazyLoader(spec.loader)
                class Finder: find_spec = lambda name, *_: spec if name == "sleepy" else None
                {load}
                sys.modules["sleepy"] = sleepy
                """)
            self.expect(asleep, "")
            self.expect(asleep + "sleepy.value", "woken sleepy")
            self.expect("sleepy.value", "woken sleepy", before=asleep)

    def test_a_module_run_with_m_counts_and_a_script_does_not(self) -> None:
        source = "import popcon; print(popcon.used_libraries() & {'tool'})"
        self.install("tool", "tool.py", source=source)
        script = str(self.site / "tool.py")  # with -m, a mere argument
        self.assertEqual(self.run_python(script).stdout, "set()\n")
        self.assertEqual(self.run_python(script, "-m", "tool").stdout, "{'tool'}\n")

    def test_what_modules_make_of_themselves_does_not_mislead(self) -> None:
        self.expect("import alpha; alpha.__file__ = alpha.__spec__.origin = 5", "")
        for code in (
            "sys.modules['x.y.z'] = alpha; alpha.__file__ = '/x/beta.py'",
            "sys.modules['x'] = sys.modules.pop('alpha'); del alpha.__file__",
            "from alpha import part; del sys.modules['alpha']; part.__class__ = Module",
            "import importlib.util as u; alpha.__spec__ = u.find_spec('beta')",
            "del alpha.__spec__", "del alpha.__file__", "del alpha.__builtins__",
        ):  # fmt: skip
            self.expect(f"class Module(type(sys)): pass\nimport alpha; {code}", "alpha")
        for item in (
            "class Self:\n    def __getattr__(self, name): sys.exit('woken')\nitem = Self()",
            "class Self(types.ModuleType):\n    def f(self): pass\nitem = Self('module')",
            "def item(): pass", "class item:\n    @classmethod\n    def f(self): pass",
            "class Self(dict):\n    def __init__(self): self.__dict__ = self\nitem = Self()",
            "item = types.ModuleType(__name__); item.__spec__ = __spec__",
            "item = types.ModuleType(__name__); item.__file__ = __file__",
        ):
            source = f"import sys, types\n{item}\nsys.modules[__name__] = item"
            self.install("self", "itself.py", source=source)
            with self.subTest(item=item):
                self.expect("import itself", "self")

    def test_a_module_made_of_a_file_that_nobody_executed_neither_counts_nor_hides(self) -> None:
        self.install("first", "shared/__init__.py", "shared/first.py")
        self.install("second", "shared/second.py")
        # So do the *-nspkg.pth files that setuptools has written for namespace packages.
        made = "import importlib.util as u; shared = u.module_from_spec(u.find_spec('shared'))\n"
        made += "sys.modules['shared'] = shared\n"
        self.expect("import shared.second", "second", before=made)
        self.expect("import shared.first", "first", before=made)
        self.expect(f"{made}import shared.second", "second")

    def test_what_is_no_module_costs_nobody_a_count_and_is_never_run(self) -> None:
        self.install("numpy", "numpy/__init__.py")
        code = """
            ModuleType, ModuleSpec = type(sys), type(sys.__spec__)
            def boom(*ignored): print("executed"); raise SystemExit(3)
            names = "getattribute getattr eq ne hash str repr bool len iter fspath dir call".split()
            evil = {f"__{name}__": boom for name in names}
            bases = object, ModuleType, type, ModuleSpec
            Evil, EvilModule, EvilMeta, EvilSpec = [type("Evil", (base,), evil) for base in bases]
            EvilClass = EvilMeta("numpy", (), {})
            Held = type("Held", (), {"__dict__": property(boom)})
            spec = ModuleSpec("spec", None)
            spec.name = spec.origin = Evil(); spec.has_location = True
            def module(**namespace):
                made = ModuleType("made"); vars(made).update(namespace); return made
            modules = [5, "numpy", Evil(), Held(), EvilClass, object.__new__(EvilClass),
                EvilModule("numpy"), ModuleType.__new__(ModuleType), module(__spec__=spec),
                module(__spec__=spec, __file__="/x.py"), module(__spec__=EvilSpec("x", None)),
                module(__spec__=Evil(), __path__=Evil(), __loader__=Evil(), __package__=Evil(),
                       __file__=Evil())]
            sys.modules.update({f"odd{n}": one for n, one in enumerate(modules)})
            sys.modules.update(numpy=ModuleType("numpy"), beta=None)
            sys.modules[7] = sys.modules[("numpy",)] = sys.modules[None] = sys
            import alpha
            """
        self.expect(code, "alpha")

    def test_paths_may_be_anything(self) -> None:
        self.expect("import beta; sys.path = None", "beta")
        os.mkfifo(self.folder / "pipe")
        for file in (
            "<string>", "odd", "beta.py", "\0/x.py", "/tmp/\ud800/x.py", f"{self.site}/\ud800.py",
            "/dev/null/x.py", f"{self.folder}/pipe/x.py",
        ):  # fmt: skip
            code = f"""
                import beta, importlib.metadata as metadata, types
                metadata.packages_distributions = metadata.distributions = print
                sys.modules["odd"] = odd = types.ModuleType("odd"); odd.__file__ = {file!r}
                sys.path[:] = [None, 5, b"x", "", "/nowhere", "/", "relative", "\\0"]
                """
            self.expect(code, "beta")

    def test_a_file_name_that_the_encoding_does_not_hold_counts(self) -> None:
        self.install("accents", "é/__init__.py")
        code = "import os; __import__(os.fsdecode(b'\\xc3\\xa9'))"
        self.expect(code, "accents")
        self.expect(code, "accents", LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")

    def test_a_folder_within_another_belongs_to_the_outer_one_first(self) -> None:
        self.install("pywin32", "win32/lib/win32con.py")
        inner = self.site / "tools" / "_vendor"
        self.install("vendored", "vendored/__init__.py", folder=inner)
        self.install("tools", record="tools/_vendor/vendored/__init__.py,,\n")
        self.install("added", "added.py", folder=inner)  # by pip install --target
        self.expect(f"sys.path += [{str(self.site / 'win32/lib')!r}]; import win32con", "pywin32")
        self.expect(f"sys.path += [{str(inner)!r}]; import vendored, added", "tools added")

    def test_each_folder_on_sys_path_has_its_metadata_even_if_it_is_relative_or_left(self) -> None:
        target = self.folder / "target"
        self.install("beta-two", "beta.py", folder=target)
        path = os.pathsep.join(map(str, [target, self.site, HERE]))
        self.expect("import alpha, beta", "alpha beta-two", PYTHONPATH=path)
        self.expect(f"sys.path[:0] = [{str(target)!r}]; import beta; del sys.path[0]", "beta-two")
        self.expect("sys.path[:0] = ['../target']; import beta, os; os.chdir('/')", "beta-two")


# ---- files -> the libraries that own them -------------------------------------------


class TestMetadata(Case):
    def test_record_is_read_as_csv_says(self) -> None:
        for record, is_listed in [
            ('"a/b.py","sha256=x","1"\n', True), ("a/b.py\n", True), ("a/b.py\r\n", True),
            ('"c,d.txt",sha256=x,1\na/b.py,sha256=y,2\n', True), ('x,,\n"a/b.py",,\n', True),
            ("a/b.py,,\r\nc.py,,\r\n", True), ("c.py,,\r\na/b.py,,\r\n", True),
            ('"q""uoted",,\na/b.py,,', True), ("zzz.py,,\nc/b.py,,\na/b.py,,\nd/e.py,,", True),
            ('"x,a/b.py",,\n"a/b.py,x",,\n', False),
            ("a/b.pyi,,\na/b.py.bak,,\na/b.py#,,\na/bb.py,,\naa/b.py,,\nx/a/b.py,,\n", False),
        ]:  # fmt: skip
            with self.subTest(record=record):
                self.install("alpha", record=record)
                self.assertEqual(self.owners("a/b.py"), {"alpha"} if is_listed else set())
                self.assertEqual(self.owners("b.py", "d.txt"), set())

    def test_the_name_is_the_metadatas(self) -> None:
        for text, name in [
            ("Name: Real.Name\n", "real-name"), ("\nMetadata-Version: 2.1\nName: blank\n", "blank"),
            ("\r\n\r\nName: crlf\r\n\r\nName: x\r\n", "crlf"), ("\n\nName: two\n", "two"),
            (f"Summary: {'x' * 5000}\nname:   far\n", "far"), ("Version: 1\n\nName: x\n", ""),
            ("Name: evil:1|c\nevil\n", ""), ("Version: 1\r\n\r\nName: x\r\n", ""), ("", ""),
        ]:  # fmt: skip
            with self.subTest(text=text[:30]):
                info = self.install("x", "x.py", info="y-1.0.dist-info", more={"METADATA": text})
                self.assertEqual(self.owners("x.py"), {name} - {""})
                self.assertEqual(popcon.Distribution(str(self.site), info.name).name(), name)

    def test_rubbish_costs_only_the_distribution_it_is_in(self) -> None:
        self.install("good", "good.py")
        rubbish: list[tuple[bytes, ...]] = [  # RECORD, METADATA
            (bytes(range(256)) * 99, bytes(range(256))), (b"good.py,,\n",),
            (b"good.py,,\n", b"Name: a\x00b\n"), (b"good.py,,\n", "Name: bös\n".encode("latin-1")),
            (b'"good.py\n\x00,,', b"Name: nul\n"), (b'"' + 200_000 * b"x", b"Name: long\n"),
            (b"/etc/passwd,,\n../../x.py,,\n../good.py,,\n", b"Name: dots\n"),
            (b"\n\n,,\n,\n", b"Name: void\n"), (b"\xff\xfeg\x00o\x00", b"Name: utf16\n"),
        ]  # fmt: skip
        for number, contents in enumerate(rubbish):
            info = self.site / f"{number}.dist-info"
            info.mkdir()
            for name, content in zip(("RECORD", "METADATA"), contents):
                (info / name).write_bytes(content)
        for name in ("Ünïcode", "", "pipe", "zero", "folder"):
            (self.site / f"{name}.dist-info").mkdir()
        os.mkfifo(self.site / "pipe.dist-info" / "RECORD")  # reading it must not block
        (self.site / "zero.dist-info" / "RECORD").symlink_to("/dev/zero")
        (self.site / "folder.dist-info" / "RECORD").mkdir()
        (self.site / "file.dist-info").write_text("a file where a folder belongs")
        (self.site / "loop.dist-info").symlink_to(self.site / "loop.dist-info")
        self.assertEqual(self.owners("good.py"), {"good"})

    def test_fuzzed_records_agree_with_a_plain_reading(self) -> None:
        names = ["a", "b", "a-b", "a_b", "aa", "B", "_a", "é", 'q"', "c,d", "^", "]"]
        draw = random.Random(1)
        for number in range(100):
            folder, expected = self.folder / str(number), set()
            paths = sorted({"/".join(draw.choices(names, k=k)) + ".py" for k in [1, 2, 3] * 10})
            wanted = set(draw.sample(paths, draw.randint(1, 10)))
            for library in "uvwxyz"[: draw.randint(1, 6)]:
                files, out = draw.sample(paths, draw.randint(0, 8)), io.StringIO()
                dialect, end = draw.choice(["excel", "unix"]), draw.choice(["\n", "\r\n"])
                writer = csv.writer(out, dialect, lineterminator=end)
                writer.writerows([[file, draw.choice(["", "sha256=a-_"]), ""] for file in files])
                self.install(library, record=out.getvalue() or "x,,", folder=folder)
                expected |= {library} if wanted.intersection(files) else set()
            with self.subTest(number=number):
                self.assertEqual(self.owners(*wanted, folder=folder), expected)


class TestWithoutRecord(Case):
    def test_names_decide(self) -> None:
        for name, top in [
            ("PyYAML", "_yaml\nyaml\n"), ("six", ""), ("typing-extensions", ""), ("tomli", ""),
            ("tomli-w", ""), ("rich", ""), ("azure-storage-blob", "azure"), ("azure-core", "azure"),
            ("azure-mgmt-core", "azure"), ("google-auth", ""), ("protobuf", "google\n"),
            ("googleapis-common-protos", "google\n"),
        ]:  # fmt: skip
            self.install(name, record=None, more={"top_level.txt": top} if top else {})
        self.write(self.site, {"old-1.0.egg-info": "Metadata-Version: 1.0\nName: old\n"})
        self.write(self.site, {"eggy.egg-info/PKG-INFO": "Name: eggy"})
        for module, expected in {
            "yaml/__init__.py": "pyyaml", "_yaml/__init__.py": "pyyaml", "six.py": "six",
            "old/__init__.py": "old", "eggy/__init__.py": "eggy", "tomli_w/__init__.py": "tomli-w",
            "typing_extensions.py": "typing-extensions", "rich_private.py": "", "pyyaml.py": "",
            "azure/storage/blob/__init__.py": "azure-storage-blob", "azure/core/x.py": "azure-core",
            "azure/other.py": "azure-storage-blob azure-core azure-mgmt-core",
            "google/auth/x.py": "google-auth", "google/protobuf/__init__.py": "protobuf",
        }.items():  # fmt: skip
            with self.subTest(module=module):
                self.assertEqual(self.owners(module), set(expected.split()))

    def test_names_decide_only_of_what_no_record_lists(self) -> None:
        top = {"top_level.txt": "azure\n"}
        self.install("azure-storage-blob", "azure/storage/blob.py", more=top)
        self.install("azure-other", record=None, more=top)
        self.assertEqual(self.owners("azure/storage/blob.py"), {"azure-storage-blob"})
        self.assertEqual(self.owners("azure/x.py"), {"azure-other"})
        both = {"azure-storage-blob", "azure-other"}
        self.assertEqual(self.owners("azure/storage/blob.py", "azure/x.py"), both)

    def test_condas_own_lists_tell_and_are_read_only_where_they_could_matter(self) -> None:
        self.install("soup-four", "bs4like/__init__.py", record=None)
        self.install("alpha", "alpha.py")
        self.write(self.site, {"other.py": ""})
        held = ["bs4like/__init__.py", "other.pyi", "soup_four-1.0.dist-info/METADATA"]
        soup = {"name": "soup", "files": [f"lib/site-packages/{path}" for path in held]}
        other = '{"files": ["lib/site-packages/other.py"]}'
        lists = {"soup-1.json": json.dumps(soup, indent=2), "other-1.json": other}
        self.write(self.folder / "conda-meta", lists)
        hook = "lambda e, a: e == 'open' and 'conda-meta' in str(a) and print('read')"
        before = f"sys.prefix = {str(self.folder)!r}; sys.addaudithook({hook})"
        self.assertEqual(self.used("import bs4like", before=before), {"read", "soup-four"})
        self.assertEqual(self.used("import other", before=before), {"read"})
        self.assertEqual(self.used("import alpha", before=before), {"alpha"})


class TestArchives(Case):
    def test_zipped_libraries_count_in_their_own_archive_and_rubbish_costs_itself(self) -> None:
        self.install("a-csv", "a_csv.py", record="a_csv.py,x,notint,4,5\n")
        (self.install("a-name", "a_name.py") / "METADATA").write_bytes(b"Name: \xff\n")
        self.install("alpha", "alpha/__init__.py")
        self.install("gamma", "gamma.py")
        self.install("zeta", "other.py")
        self.write(self.site, {"zeta/__init__.py": ""})  # which its RECORD does not list
        self.write(self.own, {"gamma.py": ""})
        libraries = shutil.make_archive(str(self.folder / "libraries"), "zip", self.site)
        app = shutil.make_archive(str(self.folder / "app"), "zip", self.own)
        path = os.pathsep.join([app, libraries, str(HERE)])
        code = "import alpha, a_csv, a_name, gamma, zeta"
        self.assertEqual(self.used(code, PYTHONPATH=path), {"alpha"})

    def test_eggs_count_zipped_or_not(self) -> None:
        egg = self.folder / "gamma-1.0-py3.egg"
        self.write(egg / "EGG-INFO", {"PKG-INFO": "Name: Gamma.X\n", "top_level.txt": "gamma\n"})
        self.write(egg, {"gamma/__init__.py": ""})
        zipped = Path(shutil.make_archive(str(self.folder / "zipped"), "zip", egg))
        for path in (egg, zipped.rename(self.folder / "gamma-2.0-py3.egg")):
            self.assertEqual(self.used(f"sys.path += [{str(path)!r}]; import gamma"), {"gamma-x"})

    def test_the_distributions_of_a_finder_of_ones_own_count_but_no_backports(self) -> None:
        finder = textwrap.dedent("""
            from importlib import machinery, metadata
            class Distribution(metadata.Distribution):
                def __init__(self, name, top):
                    self.texts = {"METADATA": f"Name: {name}", "top_level.txt": top}
                def read_text(self, name): return self.texts.get(name)
                def locate_file(self, path): return path
            class Finder:
                create_module = exec_module = lambda *ignored: None
                def find_spec(self, name, *ignored):
                    return machinery.ModuleSpec(name, self) if name in ("virtual", "mine") else None
                def find_distributions(self, context=None):
                    return [Distribution("Vir.tual", "virtual"), Distribution("other", "other")]
            sys.meta_path.insert(0, Finder())
            """)
        # A backport's class has the same name as the standard library's.
        backport = finder + "Distribution.__name__ = 'PathDistribution'\n"
        backport += "metadata.packages_distributions = lambda: print('asked') or {}\n"
        self.install("clash", "virtual.py")
        self.assertEqual(self.used(finder + "import virtual"), {"vir-tual"})
        self.assertEqual(self.used(finder + "import mine"), set())
        self.assertEqual(self.used(backport + "import virtual"), set())


# ---- libraries -> statsd lines -> datagrams -> socket ---------------------------------

HOST, DEBUG = "PYTHON_POPCONTEST_STATSD_HOST", {"PYTHON_POPCONTEST_DEBUG": "1"}


class Libraries(Case):
    def setUp(self) -> None:
        super().setUp()
        for name in ("alpha", "beta", "gamma"):
            self.install(name, f"{name}.py")

    def script(self, code: str, *flags: str, **options: Any) -> tuple[list[str], str, str, int]:
        """As sent(), of a script that sets popcon up by itself."""
        self.write(self.own, {"program.py": textwrap.dedent(code)})
        return self.sent("program.py", *flags, **options)


class TestSending(Libraries):
    def test_the_very_bytes(self) -> None:
        code = "import popcon; popcon.setup_reporter(); import beta, alpha"
        for address in ("127.0.0.1", "::1"):
            no_ipv6 = contextlib.suppress(*([OSError] if ":" in address else []))
            with self.subTest(address=address), no_ipv6, Server(address) as server:
                self.run_python(code, **server.settings)
                datagram = f"{PREFIX}alpha:1|c\n{PREFIX}beta:1|c".encode()
                self.assertEqual(server.received(), [datagram])
        self.assertEqual(popcon.statsd_line("x", "p", "1.0"), b"p.x:1|c")
        self.assertEqual(popcon.statsd_line("x", "p", "0.10"), b"p.x:1|c|@0.10")

    def test_ipv4_comes_first(self) -> None:
        code = "import alpha, _socket; found = _socket.getaddrinfo\n"
        code += "other = _socket.AF_INET6, 0, 0, '', ('::1', 9)  # takes what nobody reads\n"
        code += "_socket.getaddrinfo = lambda *arguments: [other, *found(*arguments)]"
        self.assertEqual(self.sent(code)[0], ["alpha"])

    def test_datagrams_are_full_but_never_over_1232_bytes(self) -> None:
        for sizes, full in [([9, 1222], [1232]), ([9, 1223], [9, 1223]), ([9] * 200, [1229, 769])]:
            lines = [bytes([65 + number % 26]) * size for number, size in enumerate(sizes)]
            datagrams = popcon.datagrams(lines)
            self.assertEqual([*map(len, datagrams)], full)
            self.assertEqual(b"\n".join(datagrams).split(b"\n"), lines)
        name, rate = popcon.normalized("x" * 200), "0.12345678901234567"
        self.assertLessEqual(len(popcon.statsd_line(name, "p" * 1000, rate)), 1232)

    def test_each_library_once_per_process_whatever_is_set_up_again(self) -> None:
        start = f"import site; site.addsitedir({str(self.site)!r})"
        setup = "import popcon\npopcon.setup_reporter()\n"
        self.write(self.site, {"popcon.pth": setup.replace("\n", ";")})
        self.write(self.own, {"app.py": setup + "import alpha, beta\n"})
        by_hand = """
            import alpha; print(popcon.report(), popcon.report())
            popcon.setup_reporter(); import beta; popcon.setup_reporter(); print(popcon.report())
            import threading; threading.Thread(target=popcon.setup_reporter).start()
            print(sorted(popcon.used_libraries()))
            """
        for code, printed in [
            (by_hand, "['alpha'] []\n['beta']\n['alpha', 'beta']\n"),
            (f"{start}; import alpha; site.main(); {start}; import beta", ""),
            ("import runpy; runpy.run_path('app.py'); runpy.run_path('app.py')", ""),
        ]:
            with self.subTest(code=code):
                self.assertEqual(self.sent(code), (["alpha", "beta"], printed, "", 0))

    def test_without_a_setup_all_that_is_loaded_counts_and_a_setup_doubles_nothing(self) -> None:
        code = "import alpha, popcon; print(popcon.report()); popcon.setup_reporter(); import beta"
        names, out, _, _ = self.script(code)
        self.assertIn("alpha", out)
        self.assertEqual([names.count("alpha"), names.count("beta")], [1, 1])

    def test_the_sample_rate_draws_processes_and_is_told_to_the_server(self) -> None:
        draws = [popcon.Reporter().draw for _ in range(1000)]
        self.assertTrue(400 < sum(draw < 0.5 for draw in draws) < 600)
        code = "import popcon; popcon.setup_reporter(); import alpha; popcon._reporter.draw = 0.5\n"
        code += "popcon.report(); popcon._reporter.draw = 0.49"
        rate: dict[str, Any] = {"PYTHON_POPCONTEST_STATSD_SAMPLE_RATE": "0.5"} | DEBUG
        with Server() as server:
            said = self.run_python(code, **server.settings, **rate).stderr
            self.assertEqual(server.received(), [f"{PREFIX}alpha:1|c|@0.5".encode()])
        self.assertRegex(said, r"\A.* is not in the sample of 0.5\npopcon: sent .*\n\Z")

    def test_nothing_is_sent_without_a_host_or_under_do_not_track_and_debug_says_why(self) -> None:
        prefix = "PYTHON_POPCONTEST_STATSD_PREFIX"
        for settings, names, said in [
            ({HOST: ""}, [], f"nothing sent: {HOST} is not set"),
            ({HOST: "nowhere.invalid"}, [], "nothing sent: .*"),
            ({"DO_NOT_TRACK": "1"}, [], "nothing sent: DO_NOT_TRACK is set"),
            ({"DO_NOT_TRACK": ""}, [], "nothing sent: DO_NOT_TRACK is set"),
            ({"DO_NOT_TRACK": "0"}, ["alpha"], rf"sent {PREFIX}alpha:1\|c to 127.0.0.1:\d+"),
            ({prefix: "a b"}, [], f"nothing sent: {prefix}='a b': must be .*"),
        ]:
            with self.subTest(settings=settings):
                self.assertEqual(self.sent("import alpha", **settings), (names, "", "", 0))
                *sent, err, _ = self.sent("import alpha", **DEBUG, **settings)
                self.assertEqual(sent, [names, ""])
                self.assertRegex(err, rf"\Apopcon: {said}\n\Z")
        self.assertEqual(self.sent("", **DEBUG)[2], "popcon: nothing sent: no library was used\n")

    def test_what_was_loaded_under_do_not_track_is_not_sent_later(self) -> None:
        code = """
            import os, alpha; popcon.report()
            os.environ["DO_NOT_TRACK"] = "1"
            import beta; assert popcon.report() == []
            del os.environ["DO_NOT_TRACK"]; import gamma
            """
        self.assertEqual(self.sent(code)[0], ["alpha", "gamma"])

    def test_a_wrong_setting_is_refused_with_what_is_right(self) -> None:
        for name, right, wrong in [
            ("HOST", ["", "a", "a.b.", "10.0.0.3", "::1", "fe80::1%eth0", "my_host-1"],
             ["a b", "http://x", "statsd:9125", "x\ny", "ü", "a..b", ".", ".a", "a/b", "a" * 64]),
            ("PORT", ["", "1", "65535"], ["0", "65536", "-1", "1.5", "x", "١", "9" * 5000, " 1"]),
            ("PREFIX", ["", "a", "a.b_c-d"],
             ["a b", "a:b", "a|c", "a\nb", "é", "a..b", ".a", "a.", "a/b", "x" * 1001]),
            ("SAMPLE_RATE", ["", "1", "1.0", "0.1", ".5"],
             ["0", "1.1", "-1", "x", "nan", "1e-3", "0,5", ".", "1.2.3", "0." + "1" * 30]),
        ]:  # fmt: skip
            setting = f"PYTHON_POPCONTEST_STATSD_{name}"
            for value in right:
                with mock.patch.dict(os.environ, {setting: value}):
                    self.assertEqual(popcon.setting(setting), value or popcon.SETTINGS[setting].default)
            for value in wrong:
                refused = self.assertRaisesRegex(ValueError, f"(?s)^{setting}=.*: must be ")
                environ = mock.patch.dict(os.environ, {setting: value})
                with self.subTest(name=name, value=value[:9]), environ, refused:
                    popcon.setting(setting)

    def test_what_could_not_be_sent_is_sent_the_next_time_and_nothing_twice(self) -> None:
        for number in range(60):  # two datagrams
            self.install(f"library-{number}", f"library_{number}.py")
        code = """
            import _socket, threading
            for n in range(60): __import__(f"library_{n}")
            class Failing(_socket.socket):
                failure, sent = OSError("gone"), 0
                def sendto(self, packet, address):
                    if Failing.failure and Failing.sent: raise Failing.failure
                    Failing.sent += 1
                    return super().sendto(packet, address)
            _socket.socket = Failing; print(popcon.report())
            Failing.failure = SystemExit("the thread dies")
            thread = threading.Thread(target=popcon.report); thread.start(); thread.join()
            Failing.failure = None
            """
        names = sorted(f"library-{number}" for number in range(60))
        self.assertEqual(self.sent(code), (names, "[]\n", "", 0))

    def test_an_address_that_takes_nothing_is_neither_the_last_nor_a_name_server(self) -> None:
        code = """
            import alpha, _socket
            class Failing(_socket.socket):
                failures = [TimeoutError("busy")]
                def {0}(self, *arguments):
                    if self.failures: raise self.failures.pop()
                    return super().{0}(*arguments)
            _socket.socket, found = Failing, _socket.getaddrinfo
            _socket.getaddrinfo = lambda *arguments: found(*arguments) * {1}
            print(popcon.report(), popcon.report())
            """
        for failing in ("__init__", "sendto"):
            for addresses, printed in ((2, "['alpha'] []\n"), (1, "[] ['alpha']\n")):
                with self.subTest(failing=failing, addresses=addresses):
                    sent = self.sent(code.format(failing, addresses))
                    self.assertEqual(sent, (["alpha"], printed, "", 0))

    def test_a_silent_name_server_delays_the_exit_by_a_second_at_most(self) -> None:
        with Server() as name_server:
            code = "import alpha, _socket; _socket.getaddrinfo = print  # never called\n"
            code += name_server.silences() + "popcon.report(); popcon.report()"
            start = time.monotonic()
            ended = self.sent(code, **DEBUG, **{HOST: "statsd.example"})
            self.assertLess(time.monotonic() - start, 30)
        silent = "popcon: nothing sent: statsd.example: the name server is silent for 1 s\n"
        waits = "popcon: nothing sent: the name server was silent a while ago\n"
        self.assertEqual(ended, ([], "", silent + waits + silent, 0))  # at exit anew

    def test_the_name_server_is_asked_for_all_that_the_look_up_asks(self) -> None:
        files = {"/etc/resolv.conf": b"# x\nsearch a.b c\nnameserver 127.0.0.1\nnameserver ::1\n"}
        questions = [b"\6statsd\3mon" + end + b"\0\0\1\0\1" for end in (b"", b"\1a\1b", b"\1c")]
        none, one = b"pc\x81\x80\0\1\0\0\0\0\0\0", b"pc\x81\x80\0\1\0\1\0\0\0\0"
        asked = self.open(Server())
        asked.settimeout(30)
        self.open(mock.patch.multiple(popcon, NAME_SERVER_PORT=asked.port, read=files.get))
        for answers, patience in [([], 0.1), ([none], 0.1), ([one], 30), ([none] * 3, 30)]:
            patch = mock.patch.object(popcon, "PATIENCE", patience)
            with self.subTest(answers=answers), patch, ThreadPoolExecutor(1) as pool:
                future = pool.submit(popcon.await_name_server, "statsd.mon.", popcon.TYPE_A)
                queries = [asked.recvfrom(512) for _ in questions]
                for answer in answers:
                    asked.sendto(answer, queries[0][1])
                self.assertEqual(isinstance(future.exception(), TimeoutError), patience < 1)
                self.assertEqual([query[12:] for query, _ in queries], questions)
        asked.close()
        popcon.await_name_server("statsd.mon", popcon.TYPE_A)  # it is refused: nothing to wait for


# ---- the reporter -------------------------------------------------------------------


class TestSilence(Libraries):
    def test_setup_imports_nothing_and_works_isolated_and_without_site(self) -> None:
        code = f"""
            import sys, os  # which site, and so every interpreter but those run with -S, has loaded
            sys.path[:0] = {[str(self.site), str(HERE)]}
            before = {{"popcon", *sys.modules, *sys.builtin_module_names}}
            import popcon; popcon.setup_reporter()
            print(*set(sys.modules) - before)
            import alpha
            """
        # -I and -E keep Python from its own variables, not ours from us.
        for flags in ("", "-I", "-S", "-E", "-W error", "-I -S -W error -X dev -bb"):
            with self.subTest(flags=flags):
                self.assertEqual(self.script(code, *flags.split()), (["alpha"], "\n", "", 0))

    def test_what_is_read_and_opened_is_what_readme_says_and_else_nothing(self) -> None:
        self.install("bare", "bare.py", record=None)
        self.write(self.own, {"mine.py": ""})
        watch = textwrap.dedent("""
            import os, sys
            events = "open", "os.", "import", "socket.", "subprocess.", "exec", "compile"
            def hook(event, arguments):
                if event.startswith(events):
                    shown = [part for part in arguments if type(part) in (str, bytes, int, tuple)]
                    os.write(2, f"{event} {shown}\\n".encode())
            sys.addaudithook(hook)
            """)
        self.assertEqual(self.sent("import mine, json, csv" + watch), ([], "", "", 0))
        code = "import alpha, mine, re, time, _socket, importlib.metadata" + watch
        metadata = r"(RECORD|METADATA|PKG-INFO|direct_url\.json|top_level\.txt)"
        paths = rf"{re.escape(str(self.site))}/[\w.-]+-info/{metadata}"
        sends = r"socket.getaddrinfo .*\nsocket.__new__ .*\nsocket.sendto .*\n"
        for host, more in [("127.0.0.1", ""), ("localhost", "|/etc/(hosts|resolv.conf)")]:
            names, _, err, _ = self.sent(code, **{HOST: host})
            self.assertEqual(names, ["alpha"])
            opens = rf"(open \['({paths}{more})', \d+\]\n)+"
            self.assertRegex(err, rf"\A{opens}{sends}\Z")  # nothing listed, started, written
            for flags in re.findall(r"(?m)^open .* (\d+)\]$", err):
                self.assertEqual(int(flags) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT), 0)

    def test_a_persons_own_modules_are_never_run_by_us(self) -> None:
        self.install("quoted", record='"quoted.py",,\n')
        source = "import os; os.write(1, b'executed')\n"
        source += "import popcon; popcon.setup_reporter(); import alpha"
        shadows = """csv email random socket bisect _bisect _socket json re enum selectors string
        operator sre_compile functools collections typing types copyreg _csv _json struct zipfile"""
        self.write(self.own, {f"{name}.py": source for name in shadows.split()})
        self.assertEqual(self.sent("import alpha"), (["alpha"], "", "", 0))
        for script in ("csv.py", "random.py"):
            self.assertEqual(self.sent(script), (["alpha"], "executed", "", 0))
        # One that is loaded is not the standard library's, and not used, even if ours fail with it.
        failing = "def reader(*a): raise SystemExit('executed')\ncompile = escape = reader\n"
        for name in ("csv", "_csv", "re", "enum", "functools", "copyreg"):
            with self.subTest(name=name):
                self.write(self.folder / name, {f"{name}.py": failing})
                ended = self.sent(f"import {name}, alpha", cwd=self.folder / name)
                self.assertEqual(ended, (["alpha"], "", "", 0))

    def test_nothing_changes_the_process(self) -> None:
        hook = "import signal; sys.addaudithook(lambda event, _: event.startswith({!r}) and {})"
        thread = """
            import itertools, threading, types
            def change():
                for number in itertools.count():
                    sys.modules[f"m{number % 999}"] = types.ModuleType("m")
                    sys.modules.pop(f"m{(number + 500) % 999}", None)
            threading.Thread(target=change, daemon=True).start()
            """
        statuses = {"an exit status": 7, "a traceback": 1, "a strange stream": 120}
        for what, expected, code, *flags in [
            ("warnings are errors", "alpha", "", "-W", "error", "-bb", "-X", "dev"),
            ("optimised", "alpha", "", "-OO", "-s"),
            ("an exit status", "alpha", "raise SystemExit(7)"),
            ("a traceback", "alpha", "raise ValueError('mine')"),
            ("no stderr", "alpha", "sys.stderr = sys.stdout = None"),
            ("closed streams", "alpha", "os.close(0); os.close(1); os.close(2)"),
            ("no folder", "alpha", "os.mkdir('x'); os.chdir('x'); os.rmdir('../x')"),
            ("no sys.path", "alpha", "del sys.path[:]"),
            ("no sys.modules", "", "sys.modules.clear()"),
            ("no meta_path", "anything", "del sys.meta_path[:]"),
            ("no environment", "", "os.environ.clear()"),
            ("no descriptors", "", "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (3, 3))"),
            ("no threads", "alpha", "import _thread; _thread.start_new_thread = None"),
            ("gone", "anything", "sys.modules['random'] = sys.modules['re'] = None"),
            ("a thread that imports", "alpha", textwrap.dedent(thread)),
            ("Ctrl-C", "anything", hook.format("open", "signal.raise_signal(signal.SIGINT)")),
            ("an excepthook", "alpha", "sys.excepthook = sys.unraisablehook = 5"),
            ("a strange stream", "alpha", "sys.stderr = 5"),
            ("another folder", "alpha", "os.chdir('/')"),
            ("no clock", "", "import time; del time.monotonic"),
            ("no sockets", "", hook.format("socket", "1 / 0")),
        ]:
            with self.subTest(what=what):
                code = f"import alpha, os, sys\n{code}"
                names, *ended = self.sent(code, *flags)
                without = self.run_python("\n" + code, *flags)  # so that lines have one number
                self.assertEqual(ended, ["", without.stderr, without.returncode])
                self.assertEqual(without.returncode, statuses.get(what, 0))
                if expected != "anything":
                    self.assertEqual(names, expected.split())

    def test_no_debugger_and_no_profiler_sees_popcon(self) -> None:
        code = """
            import atexit, sys
            seen = set()
            def trace(frame, event, argument):
                seen.add(frame.f_code.co_filename.rpartition("/")[2])
                return trace
            # This is called after the report.
            atexit.register(lambda: print("popcon.py" in seen, "program.py" in seen))
            import popcon; popcon.setup_reporter(); import alpha
            def last(): pass
            sys.settrace(trace); sys.setprofile(trace); last()
            """
        self.assertEqual(self.script(code), (["alpha"], "False True\n", "", 0))

    def test_the_exit_takes_less_than_four_megabytes(self) -> None:
        for number in range(400):
            lines = (f"library_{number}/module_{n}.py,sha256={'x' * 43},123\n" for n in range(200))
            self.install(f"library-{number}", record="".join(lines))
        code = """
            import popcon, tracemalloc; popcon.setup_reporter(); import alpha
            import re, csv, json  # the process's own
            tracemalloc.start(); popcon.report(); print(tracemalloc.get_traced_memory()[1])
            """
        self.assertLess(int(self.script(code)[1]), 4_000_000)

    def test_an_older_python_says_what_is_needed_in_one_sentence(self) -> None:
        source = SOURCE.read_text(encoding="utf-8").replace("0x030A0000", "0x7F000000")
        self.write(self.own, {"old.py": source})
        names, out, err, status = self.sent("old.py", arguments=["selftest"])
        self.assertEqual((names, out, status), ([], "", 1))
        self.assertRegex(err, r"\A.*popcon needs Python 3.10.*\n\Z")


@unittest.skipUnless(hasattr(os, "fork"), "needs os.fork")
class TestForks(Libraries):
    def counts(self, code: str, **options: Any) -> dict[str, int]:
        """How often each library was sent by a program and all that it starts."""
        names, out, err, status = self.script(code, **options)
        self.assertEqual((status, err), (0, ""), out)  # -W error would hide a fork's warning
        return {name: names.count(name) for name in ("alpha", "beta", "gamma") if name in names}

    def test_a_child_counts_what_it_loaded_itself_and_without_that_looks_at_nothing(self) -> None:
        code = """
            import popcon; popcon.setup_reporter()
            import gamma, alpha, os, sys
            for _ in range(3):
                if not os.fork():
                    {}
                    sys.exit(0)
                os.wait()
            """
        look = "popcon.executed_files = popcon.setting = lambda *ignored: os.write(2, b'looked'); "
        for work, more in [
            ("import beta", {"beta": 3}),
            ("sys.modules.pop('alpha'); import beta", {"beta": 3}),
            ("import alpha; popcon.setup_reporter()", {}),
            (f"import beta; host = os.environ.pop('{HOST}'); popcon._reporter.report_after_cell(); "
             f"os.environ['{HOST}'] = host", {"beta": 3}),
            (look, {}),
            (look + "os.environ['DO_NOT_TRACK'] = '1'", {}),
            (look + f"del os.environ['{HOST}']", {}),
        ]:
            with self.subTest(work=work):
                self.assertEqual(self.counts(code.format(work)), {"gamma": 1, "alpha": 1} | more)

    def test_no_fork_warning_is_caused(self) -> None:
        code = """
            import popcon, os, sys; popcon.setup_reporter()
            for library, host in [("alpha", "localhost"), ("beta", "statsd.example")]:
                os.environ["PYTHON_POPCONTEST_STATSD_HOST"] = host
                __import__(library); popcon.report()
                os.fork() or sys.exit(0)
                assert os.wait()[1] == 0
            """
        with Server() as name_server:
            self.counts(name_server.silences() + textwrap.dedent(code))

    def workers(self, run: str, work: str = "import beta", method: str = "fork",
                module: str = "multiprocessing", **options: Any) -> dict[str, int]:  # fmt: skip
        code = f"""
            import popcon; popcon.setup_reporter()
            import alpha
            def work(number):
                {work}
            if __name__ == "__main__":
                from concurrent.futures import ProcessPoolExecutor
                import {module}; context = {module}.get_context("{method}")
                {run}
            """
        return self.counts(code, **options)

    PROCESSES = "for n in range(3): p = context.Process(target=work, args=[n]); p.start(); p.join()"
    POOL = "pool = context.Pool(1); pool.map(work, range(3)); pool.close(); pool.join()"
    EXECUTOR = "with ProcessPoolExecutor(1, context) as pool: list(pool.map(work, range(3)))"
    TERMINATED = "pool = context.Pool(1); pool.map(work, range(3)); pool.terminate()"
    LOKY = "import joblib; joblib.Parallel(2)(map(joblib.delayed(work), range(4))); "
    LOKY += "joblib.externals.loky.get_reusable_executor().shutdown()"

    def test_workers_of_multiprocessing_report_what_they_imported_themselves(self) -> None:
        for method, run, work, alpha, beta in [
            ("fork", self.PROCESSES, "import beta", 1, 3),
            ("fork", self.POOL, "import beta", 1, 1),
            ("fork", self.EXECUTOR, "import beta", 1, 1),
            ("fork", self.TERMINATED, "import beta; popcon.report()", 1, 1),
            # These import the program anew, its set-up too: each worker loads alpha by itself.
            ("spawn", self.PROCESSES, "import beta", 4, 3),
            # From 3.14 on, the server of forks does so, once for all.
            ("forkserver", self.PROCESSES, "import beta", 4 - 2 * (sys.version_info >= (3, 14)), 3),
        ]:
            with self.subTest(method=method, run=run):
                self.assertEqual(self.workers(run, work, method), {"alpha": alpha, "beta": beta})

    @unittest.skipUnless(RELATIVES, "needs POPCON_TEST_RELATIVES, a python with billiard, joblib")
    def test_workers_of_multiprocess_billiard_and_loky_report_too(self) -> None:
        for module in ("multiprocess", "billiard"):
            counted = self.workers(self.POOL, module=module, python=RELATIVES)
            self.assertEqual(counted, {"alpha": 1, "beta": 1}, module)
        self.assertEqual(self.workers(self.LOKY, python=RELATIVES), {"alpha": 1})
        set_up = "popcon.setup_reporter(); import beta"
        self.assertIn(self.workers(self.LOKY, set_up, python=RELATIVES)["beta"], (1, 2))

    @unittest.skipUnless(RELATIVES, "needs POPCON_TEST_RELATIVES, a python with gunicorn")
    def test_workers_of_gunicorn_with_a_preloaded_app_count_what_they_load_themselves(self) -> None:
        code = """
            import popcon; popcon.setup_reporter()
            import alpha, gunicorn.app.wsgiapp, os
            def app(environ, start_response):
                import beta
                start_response("200 OK", [])
                return [b"%d" % os.getppid()]
            if __name__ == "__main__": gunicorn.app.wsgiapp.run()
            """
        url = f"127.0.0.1:{free_port()}"
        options = f"--preload --workers=2 --bind={url} --log-file=log program:app".split()
        with ThreadPoolExecutor(1) as pool:
            counted = pool.submit(self.counts, code, python=RELATIVES, arguments=options)
            while not counted.done():
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{url}") as page:
                    os.kill(int(page.read()), signal.SIGTERM)
                    break
                time.sleep(0.1)
        self.assertEqual(counted.result(), {"alpha": 1, "beta": 1})  # one had the request


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
                path, flags = re.fullmatch(r"'(.*)', (\d+)", arguments).groups()
                name = os.path.basename(path)
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
        self.assertEqual(self.sent(code, **settings)[0], ["alpha"])
        self.assertFalse(bytecode.exists())

    def test_of_an_endless_record_64_megabytes_are_read(self) -> None:
        self.write(self.site, {"endless.py": ""})
        info = self.install("endless", record="endless.py,,\n")
        with open(info / "RECORD", "r+b") as record:
            record.truncate(1 << 30)  # which takes no room on the disk
        self.assertEqual(len(popcon.read(str(info / "RECORD"))), 64 << 20)
        self.assertEqual(self.sent("import alpha, endless")[0], ["alpha", "endless"])


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
        self.assertEqual(self.script(code)[1], "['beta-1.0.dist-info']\n")

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
        self.assertEqual(self.script(code)[0], ["alpha", "late"])

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
        ended = self.script(code, python=LARGE)
        used, opened, opened_next = map(int, ended[1].split())
        self.assertGreater(used, 15)
        self.assertLessEqual(opened, 4 * used + 25)
        self.assertLessEqual(opened_next, 10)


class TestUnseen(Libraries):
    """Nobody is to notice the report at exit."""

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
        self.assertEqual(self.sent(code), (["alpha"], "", "", 0))

    def test_a_name_that_cannot_be_encoded_costs_nobody_a_count(self) -> None:
        code = """
            import alpha, sys
            odd = type(sys)("odd")
            odd.__file__ = "/x/\\ud800.py"
            sys.modules["\\ud800"] = odd
            """
        names, out, err, status = self.sent(code, **DEBUG)
        self.assertEqual((names, out, status), (["alpha"], "", 0))
        self.assertIn(r"cannot tell the file of the module \ud800", err)

    def test_debug_says_nothing_on_stdout_if_there_is_no_stderr(self) -> None:
        ended = self.sent("import alpha, sys; sys.stderr = None", **DEBUG)
        self.assertEqual(ended, (["alpha"], "", "", 0))

    def test_debug_with_a_full_or_closed_stderr_changes_no_exit_status(self) -> None:
        for stderr in ("os.dup2(os.open('/dev/full', os.O_WRONLY), 2)", "os.close(2)"):
            with self.subTest(stderr=stderr):
                ended = self.sent(f"import alpha, os; {stderr}", **DEBUG)
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
        self.assertEqual(self.sent(code), (["alpha"], "", "", 0))

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
        ended = self.script(code)
        self.assertEqual(ended, (["alpha"], "True ['program.py']\n", "", 0))

    @unittest.skipUnless(hasattr(sys, "monitoring"), "needs sys.monitoring, Python 3.12")
    def test_the_events_of_a_debugger_are_given_back_and_tell_nothing_of_popcon(self) -> None:
        code = """
            import atexit, sys
            monitoring = sys.monitoring
            seen = set()
            def see(code, *arguments):
                seen.add(code.co_filename.rpartition("/")[2])
            def check():
                events = monitoring.get_events(monitoring.DEBUGGER_ID)
                print(events == monitoring.events.PY_START, sorted(seen))
            atexit.register(check)  # is called after the report
            import popcon; popcon.setup_reporter(); import alpha
            monitoring.use_tool_id(monitoring.DEBUGGER_ID, "debugger")
            start = monitoring.events.PY_START
            monitoring.register_callback(monitoring.DEBUGGER_ID, start, see)
            monitoring.set_events(monitoring.DEBUGGER_ID, start)
            """
        ended = self.script(code)
        self.assertEqual(ended, (["alpha"], "True ['program.py']\n", "", 0))

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
        names, out, _, _ = self.script(code)
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
        ended = self.script(code, python=RELATIVES, **settings)
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
        self.assertEqual(self.sent(code), (["alpha"], "", "", 0))
        early = f"import sys\n{textwrap.dedent(code).replace('alpha, ', '')}"
        early += "import popcon; popcon.setup_reporter(); import alpha"
        self.assertEqual(self.script(early), (["alpha"], "", "", 0))

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
        ended = self.sent(code, python=python, PYTHONHOME=home, **DEBUG)
        self.assertEqual(ended[0], ["alpha"], ended)

    def test_it_reports_where_os_is_frozen_in_a_folder_that_is_not_there(self) -> None:
        code = """
            import os
            os.__file__ = "/not/there/os.py"
            import popcon; popcon.setup_reporter(); import alpha
            """
        self.assertEqual(self.script(code), (["alpha"], "", "", 0))


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

    def look_up(self, answers: dict[int, int]) -> tuple[list[Any], list[int]]:
        """Look a name up; return for which families, and what the name server heard."""
        server = NameServer(answers)
        self.addCleanup(server.socket.close)
        families = []

        def getaddrinfo(name: bytes, port: int, family: int, kind: int) -> list[Any]:
            families.append(family)
            record_type = {socket.AF_INET: 1, socket.AF_INET6: 28}[family]
            if not answers.get(record_type):
                raise socket.gaierror("no address of this family")
            return [(family, kind, 0, "", ("127.0.0.1", port))]

        files = {"/etc/resolv.conf": b"nameserver 127.0.0.1\n"}
        module = mock.Mock(wraps=popcon.standard_socket())
        module.AF_INET, module.AF_INET6 = socket.AF_INET, socket.AF_INET6
        module.SOCK_DGRAM, module.getaddrinfo = socket.SOCK_DGRAM, getaddrinfo
        patches = {
            "NAME_SERVER_PORT": server.socket.getsockname()[1],
            "PATIENCE": 0.2,
            "read": lambda path: files.get(path, b""),
            "standard_socket": lambda: module,
        }
        with mock.patch.multiple(popcon, **patches):
            with contextlib.suppress(OSError):
                popcon.look_up("statsd.example", 9125)
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

    def test_a_silent_one_is_not_left_to_getaddrinfo(self) -> None:
        families, asked = self.look_up({})
        self.assertEqual((families, asked), ([], [1]))


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
        names, _, err, status = self.script(code, **options)
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

    def test_the_baseline_stays(self) -> None:
        code = """
            import alpha
            import sys, importlib, popcon; popcon.setup_reporter()
            importlib.reload(popcon).setup_reporter()
            del sys.modules["popcon"]
            import popcon; popcon.setup_reporter()
            import beta
            """
        self.assertEqual(self.script(code), (["beta"], "", "", 0))

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
        self.assertEqual(self.script(code)[0], ["alpha", "beta"])


@unittest.skipUnless(hasattr(signal, "SIGTERM") and os.name == "posix", "needs SIGTERM")
class TestSigterm(Libraries):
    """PYTHON_POPCONTEST_SIGTERM=1 lets a process that gets SIGTERM report."""

    ON: dict[str, Any] = {"PYTHON_POPCONTEST_SIGTERM": "1"}
    END = "os.kill(os.getpid(), signal.SIGTERM)"

    def test_it_reports_and_ends_by_the_signal_all_the_same(self) -> None:
        ended = self.sent(f"import alpha, os, signal; {self.END}", **self.ON)
        self.assertEqual(ended, (["alpha"], "", "", -signal.SIGTERM))

    def test_without_it_nothing_is_changed(self) -> None:
        code = "import alpha, os, signal, sys\n"
        code += "sys.stdout.write(str(signal.getsignal(signal.SIGTERM) == 0)); "
        ended = self.sent(f"{code} sys.stdout.flush(); {self.END}")
        self.assertEqual(ended, ([], "True", "", -signal.SIGTERM))

    def test_what_was_sent_already_is_not_sent_again(self) -> None:
        code = f"import alpha, os, popcon, signal; popcon.report(); import beta; {self.END}"
        self.assertEqual(self.sent(code, **self.ON)[0], ["alpha", "beta"])

    def test_a_handler_of_the_programs_own_is_left_alone(self) -> None:
        before = """
            import os, signal, sys
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
            import popcon; popcon.setup_reporter(); import alpha
            """
        ended = self.script(f"{before}{self.END}", **self.ON)
        self.assertEqual(ended, (["alpha"], "", "", 5))
        ignored = before.replace("lambda *_: sys.exit(5)", "signal.SIG_IGN")
        self.assertEqual(self.script(f"{ignored}{self.END}", **self.ON)[3], 0)

    def test_a_handler_that_is_set_later_is_left_alone(self) -> None:
        code = """
            import alpha, os, signal, sys
            signal.signal(signal.SIGTERM, lambda *_: os._exit(6))
            """
        ended = self.sent(f"{textwrap.dedent(code)}{self.END}", **self.ON)
        self.assertEqual(ended, ([], "", "", 6))

    def test_it_may_be_set_up_in_another_thread(self) -> None:
        code = """
            import popcon, threading
            thread = threading.Thread(target=popcon.setup_reporter)
            thread.start(); thread.join()
            import alpha
            """
        self.assertEqual(self.script(code, **self.ON), (["alpha"], "", "", 0))

    def test_children_and_workers_that_get_it_report(self) -> None:
        code = """
            import multiprocessing, os, signal, sys, time
            import popcon; popcon.setup_reporter()
            def work(connection):
                import beta
                connection.send(0)
                time.sleep(60)
            def run():
                context = multiprocessing.get_context("fork")
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=[theirs])
                process.start()
                ours.recv()
                process.terminate()
                process.join()
                print(process.exitcode)
                child = os.fork()
                if not child:
                    import gamma
                    os.kill(os.getpid(), signal.SIGTERM)
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            run()
            """
        with Server() as server:
            self.write(self.own, {"program.py": textwrap.dedent(code)})
            ended = self.run_python("program.py", **server.settings | self.ON)
            self.assertEqual(server.names(), ["beta", "gamma"])
        self.assertEqual((ended.stdout, ended.stderr), ("-15\n-15\n", ""))

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
        names, _, err, status = self.script(code, python=RELATIVES, **self.ON)
        self.assertEqual((err, status), ("", -signal.SIGTERM))
        self.assertIn("alpha", names)
        self.assertIn("uvicorn", names)


# Drives a real kernel through cells, and to its end; what each cell printed goes out.
KERNEL = """
import json, sys
from jupyter_client.manager import start_new_kernel

def execute(cell):
    # Now and then a kernel on 3.10 does not hear a request, with or without popcon: ask again.
    # What was heard is not asked again: a hook that hangs does so after the cell has begun.
    for _ in range(2):
        heard = []
        try:
            client.execute_interactive(cell, timeout=60, output_hook=heard.append)
        except TimeoutError:
            if heard:
                sys.exit(f"no end of {cell!r}: {heard}")
        else:
            said = [message["content"] for message in heard]
            return "".join([one.get("text") or "".join(one.get("traceback", ())) for one in said])
    sys.exit(f"nothing was heard of {cell!r}")

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
    return f"cells, end = {cells!r}, {end!r}\n{KERNEL}"


@unittest.skipUnless(JUPYTER, "needs POPCON_TEST_JUPYTER, a python with ipykernel, bs4, sympy")
class TestShells(Case):
    def setUp(self) -> None:
        super().setUp()
        self.startup = self.own / "profile_default" / "startup"
        self.write(self.startup, {"000-popcon.py": readme_block("python", "try:")})
        self.install("alpha", "alpha.py")
        self.server = self.open(Server())

    def run_there(self, code: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run the code where IPython is, and reports to the server."""
        folders = dict.fromkeys(SHELLS_FOLDERS, str(self.own))
        settings = self.server.settings | folders | settings
        return self.run_python(code, "-W", "ignore", python=JUPYTER, **settings)

    def kernel(self, *cells: str, end: str = "shutdown", **settings: str) -> list[str]:
        """What each cell of a real kernel printed."""
        for _ in range(2):  # now and then one on 3.10 hears nothing any more, even without popcon
            ended = self.run_there(kernel_code(*cells, end=end), **settings)
            if "nothing was heard" not in ended.stderr:
                break
            self.server.received()
        self.assertEqual(ended.returncode, 0, ended.stderr[-2000:])
        out: list[str] = json.loads(ended.stdout.splitlines()[-1])
        return out

    def test_a_session_that_uses_no_library_sends_nothing(self) -> None:
        asks = "kernel = get_ipython().kernel; print(kernel.do_inspect('len', 3)['found'], "
        asks += "[kernel.do_complete(text, len(text))['matches'] for text in ('import o', 'pri')])"
        out = self.kernel("1+1", "print('hi')", "1/0", asks, "%timeit -n1 -r1 1", "%pwd", "%who")
        self.assertEqual(out[1], "hi\n")
        self.assertIn("ZeroDivisionError", out[2])
        self.assertRegex(out[3], "^True .*'os'.*'print'")
        self.assertNotIn("popcon", "".join(out[:-1]))
        self.assertEqual(self.server.names(0.5), [])

    def test_a_session_that_comes_after_the_set_up_counts_no_shell_and_loses_nothing(self) -> None:
        self.install("beta", "beta.py")
        early = "import popcon; popcon.setup_reporter(); import alpha"
        self.write(self.site, {"sitecustomize.py": early})
        code = "from IPython import start_ipython\nstart_ipython(['--quick', '-c', '{}'])"
        for cell, expected in (("1/0", ["alpha"]), ("import beta", ["alpha", "beta"])):
            self.run_there(code.format(cell))
            self.assertEqual(self.server.names(), expected)

    def test_what_is_imported_in_cells_counts_once_even_if_the_baseline_requires_it(self) -> None:
        metadata = {"METADATA": "Name: helper\nRequires-Dist: alpha\n"}
        self.install("helper", "helper.py", more=metadata)
        self.write(self.startup, {"000-a.py": "import helper"})
        again = "import popcon; popcon.setup_reporter(); popcon.setup_reporter()\n"
        again += "hooks = get_ipython().events.callbacks['post_execute']\n"
        again += "print(hooks.count(popcon._reporter.report_after_cell))"
        cells = "import sympy", "import alpha, helper", "1/0", "import sympy, alpha", "%reset -f"
        *_, count, last = self.kernel(*cells, again, "import bs4; print(popcon.report())")
        self.assertEqual(count, "1\n")
        self.assertIn("'beautifulsoup4'", last)
        names = self.server.names(0.5)
        self.assertEqual(len(names), len(set(names)))
        self.assertLessEqual({"alpha", "beautifulsoup4", "sympy", "mpmath"}, set(names))
        own = {"ipython", "ipykernel", "executing", "stack-data", "jedi", "parso", "six"}
        self.assertFalse({"helper", *own} & set(names))

    def test_a_kernel_that_is_killed_loses_nothing_of_an_earlier_cell(self) -> None:
        fails = "import popcon; popcon.newest_module = lambda: 1 / 0"
        for end in ("kill", "restart"):
            with self.subTest(end=end):
                out = self.kernel("import alpha", fails, "print(2)", end=end)
                self.assertEqual(out, ["", "", "2\n"])
                self.assertEqual(self.server.names(0.5), ["alpha"])

    def test_a_silent_name_server_is_asked_once_in_a_kernel_and_again_at_exit(self) -> None:
        with Server() as name_server:
            self.write(self.startup, {"001-silent.py": name_server.silences()})
            cells = "import alpha", "import bs4", "import sympy"
            self.kernel(*cells, PYTHON_POPCONTEST_STATSD_HOST="statsd.example")
            self.assertEqual(len(name_server.received(0.5)), 2)

    def test_an_extension_that_a_person_chose_counts_with_what_it_imports(self) -> None:
        source = "import alpha\ndef load_ipython_extension(shell): pass\n"
        self.install("chosen", "chosen.py", source=source)
        settings = "c.InteractiveShellApp.extensions = ['chosen', 'autoreload']\n"
        files = ("ipython_config.py", "ipython_kernel_config.py")
        self.write(self.startup.parent, dict.fromkeys(files, settings))
        self.kernel("1+1")
        self.assertEqual(self.server.names(0.5), ["alpha", "chosen"])
        early = "import popcon; popcon.setup_reporter()"
        self.write(self.site, {"sitecustomize.py": early})
        self.run_there("import IPython; IPython.start_ipython(['-c', '1+1'])")
        self.assertEqual(self.server.names(), ["alpha", "chosen"])

    def test_autoreload_of_another_version_loses_nothing_and_sends_nothing_twice(self) -> None:
        source = SOURCE.read_text(encoding="utf-8")
        newer = re.sub('__version__ = ".*"', '__version__ = "99.0"', source)
        self.write(self.site, {"popcon.py": source})
        for name in ("beta", "gamma"):
            self.install(name, f"{name}.py")
        copied = f"import popcon; open(popcon.__file__, 'w').write({newer!r})"
        out = self.kernel(
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

    def test_terminal_ipython_works_the_same(self) -> None:
        ended = self.run_there(r"""
            import pexpect, sys
            arguments = ["-m", "IPython", "--simple-prompt", "--no-banner"]
            shell = pexpect.spawn(sys.executable, arguments, encoding="utf-8", timeout=60)
            for line in ("1/0", "import alpha", "print(6 * 7)"):
                shell.expect(r"In \[\d+\]: ")
                shell.sendline(line)
            shell.expect(r"42\s+In \[4\]: ")
            shell.kill(9)
            """)
        self.assertEqual((ended.returncode, self.server.names(0.5)), (0, ["alpha"]), ended.stderr)


# ---- real libraries, real servers ---------------------------------------------------

# Reads all metadata by the slow and plain way of the standard library: which files are whose.
ALL_FILES = """
import importlib.metadata, json, re
owners = {}
for one in importlib.metadata.distributions():
    if '"editable"' not in (one.read_text("direct_url.json") or ""):
        name = re.sub("[-_.]+", "-", one.metadata["Name"]).lower()
        for file in one.files or ():
            owners.setdefault(str(one.locate_file(file)), []).append(name)
print(json.dumps(owners))
"""

# Asks every module for its file in the plain way, and looks it up. Shares nothing with popcon.
ORACLE = r"""
import importlib, json, os, sys
owners = json.load(open(sys.argv[1]))
before, after = sys.argv[2].split(":")
def loaded():
    names = set()
    for module in list(sys.modules.values()):
        if isinstance(module, type(sys)):
            spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
            file = spec.origin if spec is not None and spec.has_location else file
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

# The names of the modules are unlike the libraries' on purpose. Before the colon: the baseline.
SESSIONS = """
: pandas matplotlib.pyplot sklearn.linear_model scipy.stats seaborn statsmodels.api
: yaml PIL.Image cv2 bs4 dateutil.parser _cffi_backend lxml.etree docx OpenSSL attr
: six.moves.urllib.parse; : google.cloud.storage google.protobuf.message; : google.auth
: google.cloud.bigquery google.api_core; : azure.identity; : azure.storage.blob azure.core
: opentelemetry.sdk.trace; : opentelemetry.trace; : zope.interface; : ruamel.yaml
: backports.tarfile; : jaraco.functools; : pip._vendor.rich pip._internal.cli.main
: librosa skimage.filters nilearn.plotting; : tlz distributed dask.dataframe xarray zarr
: twisted.internet.defer scrapy nacl paramiko; : ipykernel jupyter_client jupyterlab notebook
pandas IPython: matplotlib.pyplot pandas.io.excel requests IPython.display
google.auth: google.cloud.storage; six numpy: dateutil.rrule numpy.fft numba
"""


class TestRealThings(Case):
    @unittest.skipUnless(LARGE, "needs POPCON_TEST_LARGE, a python with several hundred libraries")
    def test_agrees_with_a_plain_reading_of_all_metadata_in_a_large_environment(self) -> None:
        owners = self.folder / "owners.json"
        owners.write_text(self.run_python(ALL_FILES, "-W", "ignore", python=LARGE).stdout)

        def session(line: str) -> Any:
            result = self.run_python(ORACLE, python=LARGE, arguments=[str(owners), line])
            assert result.returncode == 0, line + result.stderr[-1000:]
            return json.loads(result.stdout.splitlines()[-1])

        total = set()
        lines = re.split("[;\n]", SESSIONS.strip())
        with ThreadPoolExecutor(2) as pool:
            for line, (ours, oracle) in zip(lines, pool.map(session, lines)):
                with self.subTest(line=line):
                    self.assertEqual(ours, oracle)
                    self.assertTrue(ours)
                    total.update(ours)
        self.assertGreater(len(total), 100)

    def test_no_metadata_raises_or_adds_a_line_or_hides_another_library(self) -> None:
        parts = rb'a/b.py~,~"~Name:~ ~x~:1|c~..~/~a~top~(~[~]~good.py~; extra == "x"'.split(b"~")
        parts += [b"\n", b"\r\n", b"\0", b"\xff", b"\xc3\xa9", b"Requires-Dist:"]
        folders = "a-1.dist-info A.egg-info b.dist-info .dist-info -.dist-info ipython.egg-info"
        begins = {"RECORD": b"a/b.py,\n", "METADATA": b"Name:", "PKG-INFO": b"Name:",
                  "top_level.txt": b"top\n", "direct_url.json": b"{"}  # fmt: skip
        paths = [self.site / folder / name for folder in folders.split() for name in begins]
        for seed in range(400):
            chance = random.Random(seed)
            shutil.rmtree(self.site)
            self.install("good", "good.py")
            for path in chance.sample(paths, 9):
                path.parent.mkdir(exist_ok=True)
                text = b"".join(chance.choices(parts, k=chance.randrange(9)))
                begin = chance.choice([begins[path.name], b""])
                path.write_bytes(begin + chance.choice([text, chance.randbytes(60)]))
            found = self.owners("good.py", "a/b.py", "top.py")
            self.assertIn("good", found, seed)
            for name in found:
                line = popcon.statsd_line(name, "p").decode()
                self.assertRegex(line, r"\Ap\.[a-z0-9]+(-[a-z0-9]+)*:1\|c\Z", seed)
            popcon.shell_libraries({str(self.site / 'good.py')})

    @unittest.skipUnless(DEBIAN, "needs POPCON_TEST_DEBIAN, roots with python3 and what is below")
    def test_is_right_where_debian_left_no_record(self) -> None:
        code = "import sys; sys.path.append('/tmp'); import popcon; popcon.setup_reporter()\n"
        code += "import {}\nbs4_parsers = {{'lxml', 'chardet', 'html5lib'}}\n"
        code += "print(*sorted(popcon.used_libraries() - bs4_parsers))"
        for root in DEBIAN:
            self.addCleanup(os.remove, shutil.copy(SOURCE, f"{root}/tmp"))
            for imports, expected in {
                "numpy": "numpy", "yaml": "pyyaml", "six": "six", "six.moves.urllib": "six",
                "ruamel.yaml": "ruamel-yaml ruamel-yaml-clib", "json": "",
                "bs4": "beautifulsoup4 soupsieve typing-extensions",
            }.items():  # fmt: skip
                with self.subTest(root=root, imports=imports):
                    command = ["chroot", root, "python3", "-B", "-c", code.format(imports)]
                    path = {"PATH": "/usr/sbin:/usr/bin:/bin"}
                    out = subprocess.run(command, env=path, capture_output=True, text=True)
                    self.assertEqual((out.stdout, out.stderr), (f"{expected}\n", ""))

    def load(self, settings: dict[str, Any]) -> dict[str, int]:
        """Let 500 processes that used 50 libraries each end at once; what that is to count."""
        for number in range(50):
            self.install(f"library-{number}", f"library_{number}.py")
        code = """
            import os, sys
            import popcon; popcon.setup_reporter()
            gate, opener = os.pipe()
            for _ in range(500):
                if not os.fork():
                    os.close(opener)
                    for number in range(50):
                        __import__(f"library_{number}")
                    os.read(gate, 1)
                    sys.exit()
            os.close(opener)
            for _ in range(500):
                os.wait()
            """
        result = self.run_python(code, **settings)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        return {f"library-{number}": 500 for number in range(50)}

    def settled(self, settings: dict[str, Any], counts: Callable[[], Any]) -> dict[str, float]:
        """What a server counted when it has counted the datagram that comes after all others."""
        popcon.send([b"last:1|c"], "127.0.0.1", int(settings["PYTHON_POPCONTEST_STATSD_PORT"]))
        self.wait_until(lambda: "last" in counts())
        return {name: n for name, n in counts().items() if re.match("python_popcon|.*bad_", name)}

    @unittest.skipUnless(EXPORTER, "needs POPCON_TEST_STATSD_EXPORTER, the path of statsd_exporter")
    def test_the_real_exporter_counts_each_process_once_by_readmes_mapping(self) -> None:
        for name in ("alpha", "ruamel.yaml"):
            self.install(name, f"{name.partition('.')[0]}.py")
        with self.exporter() as (settings, metrics):
            for prefix in ("", "python_popcon.namespace.prod.library_used"):
                more = settings | {"PYTHON_POPCONTEST_STATSD_PREFIX": prefix}
                for code in ("import alpha", "import alpha, ruamel", "import json"):
                    self.run_python("import popcon; popcon.setup_reporter()\n" + code, **more)
            self.run_python("import popcon; popcon.main(['selftest'])", **settings)
            loaded = self.load(settings)
            counted = self.settled(settings, metrics)
        labels = {'library="alpha"': 2, 'library="ruamel-yaml"': 1}
        labels |= {f'{label},namespace="prod"': count for label, count in labels.items()}
        labels |= {f'library="{name}"': count for name, count in loaded.items()}
        expected = {f"python_popcon_library_used{{{label}}}": n for label, n in labels.items()}
        self.assertEqual(counted, expected)

    def reference_server(self) -> tuple[dict[str, Any], Callable[[], dict[str, int]]]:
        """Start the reference statsd server: the settings for it, and what gives its counters."""
        with Server() as server:
            port = free_port()
        config = {
            "port": server.port, "address": "127.0.0.1", "backends": [], "flushInterval": 600000,
            "mgmt_port": port, "mgmt_address": "127.0.0.1",
        }  # fmt: skip
        # It has no setting for its receive buffer; sysctl net.core.rmem_default is for that.
        buffer = """
            const dgram = require("dgram"), create = dgram.createSocket;
            dgram.createSocket = (type, call) => create({type, recvBufferSize: 4194304}, call);
            """
        self.write(self.folder, {"config.js": json.dumps(config), "buffer.js": buffer})
        self.start("node", "-r", "./buffer.js", STATSD, "config.js")

        def counters() -> dict[str, int]:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as management:
                management.sendall(b"counters\n")
                answer = "".join(iter(management.makefile().readline, "END\n"))
            return {name: int(n) for name, n in re.findall(r"'?([\w.-]+)'?: (\d+)", answer)}

        self.wait_until(counters)
        return server.settings, counters

    @unittest.skipUnless(STATSD, "needs POPCON_TEST_STATSD, the reference server's stats.js")
    def test_the_reference_server_scales_samples_and_loses_nothing(self) -> None:
        self.install("alpha", "alpha.py")
        code = "import popcon; popcon.setup_reporter(); popcon._reporter.draw = 0.0; import alpha"
        settings, counters = self.reference_server()
        self.run_python(code, PYTHON_POPCONTEST_STATSD_SAMPLE_RATE="0.1", **settings)
        self.run_python(code, **settings)
        expected = {PREFIX + name: n for name, n in {"alpha": 11, **self.load(settings)}.items()}
        expected["statsd.bad_lines_seen"] = 0
        self.assertEqual(self.settled(settings, counters), expected)


# ---- the commands -------------------------------------------------------------------

ALPHA = f"{PREFIX}alpha:1|c"
NOTHING = "popcon: nothing would be sent: no library was used"


class Lone(Case):
    """A folder with popcon.py in it, and nothing else."""

    def setUp(self) -> None:
        super().setUp()
        self.lone = self.folder / "lone"
        self.write(self.lone, {"popcon.py": SOURCE.read_text("utf-8")})

    def popcon(
        self, line: str, start: str = "popcon.py", **others: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `popcon.py LINE` there, with the settings of env and no others."""
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "cwd": self.lone, "env": {}}
        options |= dict.fromkeys(["stdout", "stderr"], subprocess.PIPE) | others
        command = [sys.executable, *shlex.split(f"{start} {line}")]
        return subprocess.run(command, text=True, **options)


class TestOptions(Lone):
    def test_misuse_gets_one_sentence(self) -> None:
        for line, words in {
            "": "required: COMMAND; -h tells more", "nonsense": "nonsense", "install now": "now",
            "install --al-processes": "--al-processes", "run": "a program is missing",
            "run --explain -c": "a program is missing", "run -W error x.py": "-W",
        }.items():  # fmt: skip
            with self.subTest(line=line):
                ended = self.popcon(line)
                self.assertEqual((ended.returncode, ended.stdout), (2, ""))
                self.assertRegex(ended.stderr, rf"\Apopcon: .*{words}.*\n\Z")

    def test_version_and_help(self) -> None:
        self.assertEqual(self.popcon("--version").stdout, f"popcon {popcon.__version__}\n")
        said = self.popcon("-h").stdout
        for words in ("    selftest ", "    run ", "    install ", "    uninstall", "STATSD_HOST"):
            self.assertIn(words, said)

    def test_nobodys_own_module_is_run_by_a_command(self) -> None:
        for name in ("argparse", "json", "re", "subprocess", "socket", "compileall", "wave"):
            (self.lone / f"{name}.py").write_text("print('mine'); raise SystemExit(3)")
        for start in ("popcon.py", "-m popcon"):
            for line in ("uninstall", "run --explain -c ''"):
                ended = self.popcon(line, start)
                self.assertEqual((ended.returncode, "mine" in ended.stdout), (0, False), ended)
        (self.lone / "mine.py").write_text("import wave")
        self.assertEqual(self.popcon("run mine.py").stdout, "mine\n")

    def test_a_stdout_that_takes_nothing_gets_no_traceback(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as pipe, open("/dev/full", "wb") as full:
            jobs: list[tuple[str, dict[str, Any], int, str]] = [
                ("uninstall", {"stdout": pipe}, 1, ""),
                ("selftest", {"stdout": pipe, "env": {"PYTHONUNBUFFERED": "1"}}, 1, ""),
                ("uninstall", {"preexec_fn": lambda: os.close(1)}, 0, ""),
                ("uninstall", {"stdout": full}, 1, r"popcon: .*No space left on device\n"),
            ]
            for command, options, status, said in jobs:
                ended = self.popcon(command, **options)
                self.assertRegex(ended.stderr, rf"\A{said}\Z")
                self.assertEqual(ended.returncode, status)

    def test_ctrl_c_ends_with_130_and_no_traceback(self) -> None:
        with mock.patch.object(popcon, "check_reports", side_effect=KeyboardInterrupt):
            self.assertEqual(popcon.main(["selftest"]), 130)


class TestSelftest(Lone):
    def selftest(self, status: int, *patterns: str, **environ: str) -> str:
        """What selftest prints with these settings: lines that match; and it ends so."""
        ended = self.popcon("selftest", env=environ)
        self.assertEqual(ended.returncode, status, ended.stdout)
        for pattern in patterns:
            self.assertRegex(ended.stdout, f"(?m)^{pattern}")
        return ended.stdout

    def test_a_lone_copy_proves_the_whole_way_and_leaves_nothing_behind(self) -> None:
        sent = r"(?m)^ok +reporting .*sent b'python_popcon.library_used.popcon-selftest:1"
        lone = "popcon.py"
        for start in (lone, f"-I {lone}", f"-IS -Werror -Xdev {lone}", "-B -Werror -m popcon"):
            with self.subTest(start=start):
                ended = self.popcon("selftest", start, env={"TMPDIR": str(self.own)})
                self.assertEqual((ended.returncode, ended.stderr), (0, ""), ended.stdout)
                self.assertRegex(ended.stdout, sent)
                self.assertRegex(ended.stdout, r"\A((ok      |warning ) .{10} \S.*\n)+\Z")
                self.assertEqual(os.listdir(self.own) + os.listdir(self.lone), [lone])

    def test_settings_each_wrong_one_with_what_is_right(self) -> None:
        settings = dict(zip(popcon.SETTINGS, ["a b", "x", "a:b", "2"])) | {"DO_NOT_TRACK": "1"}
        for name in ("DEBUG", "RATE"):
            settings[f"PYTHON_POPCONTEST_{name}"] = "1"
        opted_out, works = "warning .*DO_NOT_TRACK is set: nothing is sent", "ok +reporting"
        out = self.selftest(1, opted_out, works, **settings)
        self.assertEqual(len(re.findall("(?m)^error .*: must be ", out)), 4, out)
        unknown = re.findall(r"(?m)^warning  unknown +(\w+)", out)
        self.assertEqual(unknown, ["PYTHON_POPCONTEST_RATE"])

    def test_a_prefix_that_readmes_mapping_rules_do_not_match_is_warned_of(self) -> None:
        namespace = "python_popcon.namespace"
        for prefix, is_known in {
            "": True, f"{namespace}.physics-1.library_used": True, "mine.library_used": False,
            f"{namespace}.a.b.library_used": False, f"{namespace}.library_used": False,
            "python_popcon": False,  # as 0.4.1 wanted it
        }.items():  # fmt: skip
            with mock.patch.dict(os.environ, PYTHON_POPCONTEST_STATSD_PREFIX=prefix):
                rows = [row[1] for row in popcon.check_settings()]
            self.assertEqual("mapping" not in rows, is_known, prefix)

    def test_it_says_whether_something_listens(self) -> None:
        host = "PYTHON_POPCONTEST_STATSD_HOST"
        with Server() as server:
            settings = server.settings | {host: "localhost"}
            self.selftest(0, "ok +server .*not refuse an empty datagram", **settings)
            self.assertEqual(server.received(), [b""])
        for settings in (server.settings, {host: "nowhere.invalid"}):
            self.selftest(1, rf"error +server .*{settings[host]}.* failed: .", **settings)

    def test_a_check_that_is_impossible_is_an_error_and_the_next_is_made(self) -> None:
        for place, name in [(tempfile, "TemporaryDirectory"), (popcon, "places")]:
            fails = mock.patch.object(place, name, side_effect=FileNotFoundError("no folder"))
            with fails, contextlib.redirect_stdout(io.StringIO()) as out:
                self.assertEqual(popcon.main(["selftest"]), 1)
            said = r"(?m)^error +reports +not checked: no folder\n(.*\n)*ok +port"
            self.assertRegex(out.getvalue(), said)

    def test_a_popcon_that_reports_wrongly_is_an_error(self) -> None:
        source, end = SOURCE.read_text("utf-8"), 'if __name__ == "__main__":\n    sys.exit'
        for broken, sent in [
            ("setup_reporter = print", "b''"),
            ("if __name__ != '__main__': raise RuntimeError('broken')", r"b''\n[^$]*broken"),
            ("def statsd_line(*a): return b'x'", "b'x'"),
        ]:
            self.write(self.lone, {"popcon.py": source.replace(end, f"{broken}\n{end}")})
            self.selftest(1, f"error +reporting .*sent {sent}")


class TestRun(Case):
    def setUp(self) -> None:
        super().setUp()
        self.install("alpha", "alpha.py")

    def run_it(self, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        return self.run_python(str(SOURCE), arguments=["run", *arguments], **settings)

    def assert_same(self, *arguments: str, said: str = f"{ALPHA}\n") -> None:
        """Python ends as `popcon run` does, but that the latter says something at the end."""
        with self.subTest(arguments=arguments), Server() as server:
            path = os.pathsep.join([str(self.site), str(HERE)])
            options: Any = {"env": clean_environ(PYTHONPATH=path, **server.settings)}
            options |= {"cwd": self.own, "input": "text", "text": True, "capture_output": True}
            plain = subprocess.run([sys.executable, *arguments], **options)
            ours = subprocess.run([sys.executable, "-m", "popcon", "run", *arguments], **options)
            # python -m shows frames of runpy, from 3.13 on -c the line of code as well.
            frames = r'(?m)^  File "<frozen runpy>.*\n|^  File .*runpy.py", .*\n(    .*\n)?'
            lines = r'(?m)(^  File "<string>", .*\n)(    .*\n)+'
            expected = re.sub(lines, r"\1", re.sub(frames, "", plain.stderr))
            self.assertEqual((ours.returncode, ours.stdout), (plain.returncode % 256, plain.stdout))
            self.assertEqual(ours.stderr, expected + said)
            self.assertEqual(server.received(), [])

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
        names = "main.py", "mod.py", "package/__main__.py"
        self.write(self.own, dict.fromkeys(names, program) | {"package/__init__.py": ""})
        forms = [["main.py"], [str(self.own / "main.py")], ["-m", "mod"], ["-m", "package"]]
        jobs = [(form, "fail()") for form in [*forms, ["-c", program]]]
        endings = "sys.exit()", "sys.exit(7)", "sys.exit('words')", "sys.exit((1, 2))", "chain()"
        for form, ending in jobs + [(["main.py"], ending) for ending in endings]:
            self.assert_same(*form, "-m", "a b", "--explain", "-h", ending)
        self.assert_same("main.py", "os._exit(3)", said="")

    def test_programs_of_all_kinds(self) -> None:
        programs = {
            "hook.py": "import alpha, sys\nsys.excepthook = lambda *e: print(e[2].tb_lineno)\n1/0",
            "late.py": "import atexit\natexit.register(lambda: __import__('alpha'))\n",
            "coded.py": "# coding: latin-1\nimport alpha\nprint(ascii('\u00c3\u00a9'))\n",
            "workers.py": "import concurrent.futures as c, multiprocessing as m, alpha\n"
            "def work(n): print(n * 2, flush=True)\nif __name__ == '__main__':\n"
            "    c.ProcessPoolExecutor(mp_context=m.get_context('spawn')).submit(work, 21)\n",
            "fork.py": "import alpha, os, sys\nif os.fork(): os.wait()\n",
        }
        self.write(self.own, programs | {"syntax.py": "import alpha\n  wrong(\n"})
        for name in programs:
            self.assert_same(name)
        self.assert_same("syntax.py", said=f"{NOTHING}\n")
        self.assert_same("-c", "import sys; sys.stderr = None", said="")
        self.assert_same("-c", "import sys; sys.stdout.close()", said=f"{NOTHING}\n")

    def test_a_program_that_is_not_there_or_interrupted_shows_no_frame_of_popcons(self) -> None:
        for arguments, status, said in [
            (["nowhere.py"], 1, rf"\w+Error: .*nowhere.*\n{NOTHING}"),
            (["-m", "nowhere"], 1, rf"\w+Error: .*nowhere.*\n{NOTHING}"),
            (["-c", "import alpha; raise KeyboardInterrupt"], 130,
             rf'Traceback .*\n  File "<string>".*\nKeyboardInterrupt\n{re.escape(ALPHA)}'),
        ]:  # fmt: skip
            ended = self.run_it(*arguments)
            self.assertRegex(ended.stderr, rf"\A{said}\n\Z")
            self.assertEqual(ended.returncode, status)

    def test_it_always_ends_with_a_conclusion(self) -> None:
        why = "popcon: nothing would be sent: "
        prefix, rate = [*popcon.SETTINGS][2:]
        for code, settings, words in [
            ("import alpha", {"DO_NOT_TRACK": "0"}, ALPHA),
            ("import json", {}, NOTHING),
            ("", {}, NOTHING),
            ("import alpha", {"DO_NOT_TRACK": "1"}, f"{why}DO_NOT_TRACK is set"),
            ("import alpha", {prefix: "a b"}, f"{why}{prefix}='a b': must be"),
            ("import alpha", {prefix: "x", rate: ".5"}, "x.alpha:1|c|@.5"),
        ]:
            for options in ([], ["--explain"]):
                ended = self.run_it(*options, "-c", code, **settings)
                self.assertEqual(ended.returncode, 0)
                self.assertIn(words, ended.stderr.splitlines()[-1])

    def test_popcon_itself_is_not_what_a_program_used_and_sends_nothing(self) -> None:
        shutil.copy(SOURCE, self.site)
        self.install("popcon", record="popcon.py,,\n")
        code = "import popcon; popcon.setup_reporter(); import alpha; popcon.report()"
        for start in (str(self.site / "popcon.py"), "import sys, popcon; sys.exit(popcon.main())"):
            with Server() as server:
                ended = self.run_python(start, arguments=["run", "-c", code], **server.settings)
                self.assertEqual((ended.stderr, server.received()), (f"{ALPHA}\n", []))

    def test_explain_says_whose_each_module_is_or_why_nobodys(self) -> None:
        self.install("Beta.X", "beta/__init__.py", "beta/more.py", "beta/other.py")
        self.install("sleepy", "sleepy.py")
        self.install("before", "before.py", "late.py")
        self.install("edited", more={"direct_url.json": '{"dir_info": {"editable": true}}'})
        self.write(self.own, {"mine.py": "", "edited.py": ""})
        code = "import beta.more, beta.other, mine, edited, wave, late, sys, importlib.util as u\n"
        code += "sys.modules['sleepy'] = u.module_from_spec(u.find_spec('sleepy'))"
        start = "import sys, before, popcon; sys.exit(popcon.main())"
        ended = self.run_python(start, arguments=["run", "--explain", "-c", code])
        self.assertEqual((ended.returncode, ended.stdout), (0, ""))
        said = re.sub(r": \d+ modules of", ": N modules of", ended.stderr)
        self.assertEqual(said, textwrap.dedent(f"""\
            beta-x: 3 modules
            not counted: before: it was loaded before
            not counted: {self.own}/edited.py: of no library, or of an editable install
            not counted: {self.own}/mine.py: of no library, or of an editable install
            not counted: sleepy: not executed, without a file, or Python's own
            not counted: N modules of the standard library
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
        humbly = ["env"] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override"]
        flags = *humbly[1:], str(self.prefix / "bin" / "python"), *flags
        options = {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": ""} | options
        options |= {"python": humbly[0], "arguments": options.pop("command", "").split()}
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
        self.assertEqual((status, out, self.state()), (1, "", before))
        return err

    def state(self) -> dict[Path, bytes | bool]:
        return {path: path.is_file() and path.read_bytes() for path in self.prefix.rglob("*")}

    def reported(self, code: str = "import alpha", **settings: str) -> list[str]:
        """What the code sends in the environment; it says nothing."""
        with Server() as server:
            ended = self.run_in_it(code, "-B", "-W", "error", **server.settings | settings)
            self.assertEqual(ended, (0, "", ""))
            return server.names()

    def test_an_uninstall_leaves_the_environment_as_it_was(self) -> None:
        module = "import runpy; runpy.run_module('popcon', None, '__main__')"  # as -m popcon does

        def files(what: str) -> set[str]:
            made = self.state().keys() - before.keys()
            return {f"{what} {path}" for path in made if path.is_file()}

        others = {"__pycache__/other.cpython-399.pyc": "", "popcon_x.py": ""}
        for mine in ({}, others | {str(self.startup.with_name("500-mine.py")): ""}):
            self.write(self.purelib, mine)
            before = self.state()
            for command in ("install", "install --all-processes"):
                *said, last = self.command(command).splitlines()
                self.assertEqual({*said}, files("wrote"))
                self.assertEqual(self.pth.exists(), "--all" in command)
                self.assertRegex(last, "sent until PYTHON_POPCONTEST_STATSD_HOST is set.*selftest")
                after = self.state()
                self.assertNotIn("wrote", self.command(command))
                self.assertEqual(self.state(), after)
                self.run_in_it("import popcon", "-OO")
                self.write(self.purelib, {"__pycache__/popcon.cpython-399.pyc": ""})
                removed = files("removed")
                self.assertEqual({*self.command("uninstall", module).splitlines()}, removed)
                self.assertEqual(self.state(), before)
        self.assertIn("nothing to do", self.command("uninstall"))

    def test_files_appear_whole_or_not_at_all_and_a_cut_short_install_is_completed(self) -> None:
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
        self.command("install --all-processes")
        whole = {path: path.read_bytes() for path in (self.library, self.startup, self.pth)}
        states = {"install --all-processes": self.state().keys(), "uninstall": self.before.keys()}
        for command, other in zip(states, reversed(states)):
            for at in range(99):
                self.command(other)
                self.assertEqual(self.state().keys(), states[other], at)
                status = self.run_in_it(code, command=f"{command} {at}", cwd=self.lone)[0]
                self.assertIn(status, (0, 9))
                found = {path: path.read_bytes() for path in whole if path.exists()}
                self.assertLessEqual(found.items(), whole.items())
                if not status:
                    break
            self.assertGreater(at, 6)

    def test_installs_at_the_same_moment_do_no_harm_and_upgrade_another_version(self) -> None:
        for _ in range(2):
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(self.command, ["install --all-processes"] * 4))
            self.assertNotIn("wrote", self.command("install --all-processes"))
            for path in (self.library, self.pth, self.startup):
                path.write_text(path.read_text("utf-8") + "# older\n", "utf-8")
        self.assertEqual(self.command("install --all-processes").count("wrote"), 4)
        self.command("uninstall")
        self.assertEqual(self.state(), self.before)

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

    def test_each_process_reports_once_and_a_persons_own_popcon_is_left_alone(self) -> None:
        session = f"import runpy; runpy.run_path({str(self.startup)!r}); import alpha"
        self.command("install")
        self.assertEqual(self.reported(session), ["alpha"])
        self.assertEqual(self.reported(), [])
        elsewhere = self.folder / "elsewhere"
        for folder, path in ((elsewhere, str(elsewhere)), (self.own, "")):
            self.write(folder, {"popcon.py": "raise SystemExit('run')"})
            self.assertEqual(self.reported(session, PYTHONPATH=path), [])
        self.command("install --all-processes")
        self.assertEqual(self.reported(), ["alpha"])
        self.assertEqual(self.reported(session), ["alpha"])

    def test_activation_is_silent_whatever_popcon_is_and_leaves_no_name(self) -> None:
        self.command("install --all-processes")
        code = "import runpy, sys; print([x for x in runpy.run_path(sys.argv[1]) if x[:2] != '__'])"
        for source in (SOURCE.read_text("utf-8"), None, "half a file (", "raise RuntimeError", ""):
            self.library.unlink() if source is None else self.library.write_text(source, "utf-8")
            for flags in ([], ["-S"]):
                ended = self.run_in_it(code, "-Werror", *flags, command=str(self.startup))
                self.assertEqual(ended, (0, "[]\n", ""))

    @unittest.skipUnless(OLD_PYTHONS, "needs POPCON_TEST_OLD_PYTHONS")
    def test_older_pythons_are_told_in_a_sentence_and_by_start_up_files_nothing(self) -> None:
        self.command("install --all-processes")
        for python in OLD_PYTHONS:
            start_up = self.startup.read_text(), self.pth.read_text()
            for text in (readme_block("python", "try:"), *start_up):
                self.write(self.lone, {"sitecustomize.py": text})
                ended = self.run_python("print(1)", python=python, PYTHONPATH=str(self.lone))
                self.assertEqual((ended.stdout, ended.stderr), ("1\n", ""))
            if "/2.7" not in python:
                ended = self.run_python(str(SOURCE), python=python)
                self.assertRegex(ended.stderr, r"\Apopcon needs Python 3.10 .*\n\Z")

    def test_readmes_lines_in_sitecustomize_report_and_are_silent_without_popcon(self) -> None:
        self.write(self.lone, {"sitecustomize.py": readme_block("python", "try:")})
        self.assertEqual(self.reported(PYTHONPATH=str(self.lone)), ["alpha"])
        (self.lone / "popcon.py").unlink()
        self.assertEqual(self.reported(PYTHONPATH=str(self.lone)), [])

    def test_permissions(self) -> None:
        """Who uses the environment can read what was written; who may not write is told so."""
        self.addCleanup(os.umask, os.umask(0o077))
        readable = ["-rw-r--r--"] * 4 + ["drwxr-xr-x"] * 4
        for command, expected in (("install --all-processes", readable), ("uninstall", [])):
            subprocess.check_call(["chmod", "-R", "a-w", self.prefix])
            self.assertRegex(self.refused(command), r"\Apopcon: .*Permission denied: .*\n\Z")
            subprocess.check_call(["chmod", "-R", "u+w", self.prefix])
            self.command(command)
            made = self.state().keys() - self.before.keys()
            modes = sorted(stat.filemode(path.stat().st_mode) for path in made)
            self.assertEqual(modes, expected)
        (self.prefix / "etc").write_text("a file where a folder belongs")
        status, _, err = self.run_in_it("", command="install")
        self.assertEqual(status, 1)
        self.assertRegex(err, r"\Apopcon: .*\n\Z")

    def test_a_folder_with_letters_that_the_encoding_does_not_hold_and_brackets(self) -> None:
        self.prefix = self.prefix.rename(self.folder / "[x]\u00f6")
        for command in ("install", "selftest", "uninstall"):
            self.assertIn("\\xf6/", self.command(command, PYTHONIOENCODING="ascii"))
        self.assertEqual([*self.prefix.rglob("*popcon*")], [])

    def test_selftest_sees_what_is_on_and_what_is_left_over(self) -> None:
        self.assertRegex(self.command("selftest"), r"\nwarning +import .*popcon.py is not there")
        shutil.copy(SOURCE, self.purelib)
        self.purelib.chmod(0o555)
        self.assertRegex(self.command("selftest"), r"\nwarning +bytecode +can't be")
        self.purelib.chmod(0o755)
        self.assertRegex(self.command("selftest"), r"\nok +bytecode .*popcon\.py\n")
        self.assertTrue([*self.purelib.glob("__pycache__/popcon.*.pyc")])
        self.command("install --all-processes")
        every = r"\nok +bytecode .*\nok +cost .*\n.*\nok +processes +every one reports\n"
        self.assertRegex(self.command("selftest"), every)
        self.library.unlink()
        self.write(self.startup.parent, {"1.py": "import popularity_contest.reporter", "2.py": ""})
        three = r"warning +import .*(\nwarning +left over .*){3}(\nok .*){2}\nok +processes +not"
        self.assertRegex(self.command("selftest"), three)

    def test_from_python_3_18_on_a_start_file_activates(self) -> None:
        with mock.patch.object(sys, "version_info", (3, 18)):
            _, switches = popcon.places()
        self.assertEqual([Path(path).name for path in switches], ["000-popcon.py", "popcon.start"])
        if sys.version_info >= (3, 15):
            code = "import sys, sysconfig, popcon; sysconfig.get_paths(); "
            code += "sys.version_info = 3, 18; popcon.main()"
            self.command("install --all-processes", code, cwd=self.lone)
            self.assertFalse(self.pth.exists())
            self.assertEqual(self.reported(), ["alpha"])

    def test_what_pip_installed_is_used_and_left(self) -> None:
        info = self.install("popcon", folder=self.purelib, record="popcon.py,,\n")
        shutil.copy(SOURCE, self.purelib)
        installed = self.state()
        its = str(self.library)
        self.assertNotIn("__pycache__", self.command("install --all-processes", its))
        self.assertEqual(self.reported(), ["alpha"])
        self.assertIn(f"left {its}: it was installed by pip", self.command("uninstall", its))
        shutil.rmtree(self.purelib / "__pycache__")  # of the start-up file's import
        self.assertEqual(self.state(), installed)
        self.write(self.lone, {"popcon.py": SOURCE.read_text("utf-8") + "# newer\n"})
        self.assertIn("in the way: it was installed by pip", self.refused("install"))
        self.command("install --all-processes", its)
        self.run_in_it("import popcon")  # which leaves bytecode
        self.library.unlink()
        shutil.rmtree(info)  # as pip does
        self.assertEqual(self.reported(), [])
        self.command("uninstall")
        self.assertEqual([*self.prefix.rglob("*popcon*")], [])

    def test_the_working_folder_and_pythonpath_do_not_mislead_install(self) -> None:
        for path in (f"/nowhere{os.pathsep}", str(self.lone)):
            self.command("install", cwd=self.lone, PYTHONPATH=path)
            self.assertTrue(self.library.exists())
            self.command("uninstall")

    def test_site_packages_with_two_names_are_one_and_popcon_of_other_folders_is_left(self) -> None:
        code = "import site, popcon; site.getsitepackages = lambda: [{!r}]; popcon.main()"
        link, other = self.folder / "lib64", self.site / "popcon.py"  # lib64: as on Fedora
        link.symlink_to(self.purelib)
        for command in ("install --all-processes", "install", "uninstall"):
            self.command(command, code.format(str(link)), cwd=self.lone)
        self.assertEqual(self.state(), self.before)
        code = code.format(str(self.site))
        shutil.copy(SOURCE, other)
        self.command("install", code, cwd=self.lone)
        self.assertEqual((self.library.exists(), self.startup.exists()), (False, True))
        self.command("uninstall", code, cwd=self.lone)
        self.assertEqual((other.exists(), self.state()), (True, self.before))
        self.write(self.site, {"popcon.py": SOURCE.read_text("utf-8") + "# older\n"})
        why = "it is where install does not write; nothing was changed\n"
        self.assertIn(why, self.refused("install", code, cwd=self.lone))

    @unittest.skipUnless(JUPYTER, "needs POPCON_TEST_JUPYTER, a python with IPython")
    def test_kernels_where_all_processes_report_count_no_shell_and_selftest_sees_it(self) -> None:
        place = "import ipykernel; print(ipykernel.__path__[0] + '/..')"
        (self.purelib / "jupyter.pth").write_bytes(subprocess.check_output([JUPYTER, "-c", place]))
        self.write(self.own, {"popcon.py": "raise SystemExit('run')"})
        self.assertRegex(self.command("selftest"), r"\nwarning +IPython +sessions do not report")
        self.command("install")
        on = r"\nok +processes +not each reports.*\nok +IPython +every session reports\n"
        self.assertRegex(self.command("selftest"), on)
        self.command("install --all-processes")
        kernel = kernel_code("1/0", "import alpha; print(dir())", end="kill")
        own = dict.fromkeys(SHELLS_FOLDERS, str(self.own))
        with Server() as server:
            status, out, err = self.run_in_it(kernel, "-W", "ignore", **server.settings | own)
            self.assertEqual((status, "popcon" in out), (0, False), out + err)
            datagrams = server.received(0.5)
        # The first is the kernel's; its driver is a process, and reports what it used itself.
        self.assertEqual(datagrams[0], ALPHA.encode())
        self.assertIn(b"jupyter-client", b"".join(datagrams[1:]))


# ---- usage --------------------------------------------------------------------------

PROMETHEUS = os.environ.get("POPCON_TEST_PROMETHEUS", "").split(":")
VICTORIAMETRICS = os.environ.get("POPCON_TEST_VICTORIAMETRICS", "")
SERVERS = [path for path in (*PROMETHEUS, VICTORIAMETRICS) if path]
DAY = 86400.0
ONLY_SESSIONS = "popcon: only IPython and Jupyter report here by themselves: scripts are not known"
COMMAND = {"entry_points.txt": "[console_scripts]\nx = y:main\n"}
PLUGIN = {"entry_points.txt": "[pytest11]\nx = y:main\n"}
SILENT = "its commands do not report"


class Database:
    """What Prometheus would answer of these samples; a range is open at its left, as in 3."""

    def __init__(self, *, is_closed: bool = False) -> None:
        self.series: list[tuple[dict[str, str], dict[float, float]]] = []
        self.is_closed = is_closed  # as in Prometheus 2

    def add(self, samples: dict[float, float], **labels: str) -> None:
        """Add the counter of a library; without a library, what its exporter says of its start."""
        name = "python_popcon_library_used" if "library" in labels else "process_start_time_seconds"
        target = {"__name__": name, "job": "popcon", "instance": "x:9102"}
        self.series.append((target | labels, samples))

    def over(self, query: str, end: float) -> list[tuple[dict[str, str], list[tuple[float, str]]]]:
        """What function({matchers}[1ms]) gives, or the bare matchers."""
        function, _, selector = query.rpartition("(")
        patterns = {label: json.loads(text) if how == "=~" else re.escape(json.loads(text))
                    for label, how, text in re.findall(r'(\w+)(=~?)("(?:[^"\\]|\\.)*")', selector)}
        milliseconds = float((re.findall(r"\[(\d+)ms", selector) or ["inf"])[0])
        begin = end - milliseconds / 1000 - 1e-4 * self.is_closed
        found = []
        for labels, samples in self.series:
            some = [(when, str(value)) for when, value in samples.items()
                    if begin < when <= end + 1e-4 and not (function and math.isnan(value))]
            if some and all(re.fullmatch(patterns[key], labels.get(key, "")) for key in patterns):
                last = [(end, str(len(some)))] if "count_over" in function else some[-1:]
                found.append((labels, last if function else some))
        return found

    def answer(self, asked: str) -> tuple[int, dict[str, str], bytes]:
        path, _, query = asked.partition("?")
        form = dict(urllib.parse.parse_qsl(query))
        data: Any = [labels for labels, _ in self.over(form.get("match[]", "="), 1e12)]
        if path.endswith("/query"):
            found = self.over(form["query"], float(form["time"]))
            data = {"result": [{"metric": labels, "values": values} for labels, values in found]}
        elif path.endswith("_range"):  # of a count
            begin, end, step = (float(form[key]) for key in ("start", "end", "step"))
            times = [begin + step * n for n in range(int((end - begin) / step) + 1)]
            values = [(when, "1") for when in times if self.over(form["query"], when)]
            data = {"result": [{"metric": {}, "values": values}] if values else []}
        return 200, {}, json.dumps({"status": "success", "data": data}).encode()


# Run in a large environment, with lists of libraries to be removed: nothing that stays needs one
# of them, as the packaging library reads the requirements.
STAYS = """
import importlib.metadata, json, sys
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

requirements = {canonical(one.metadata["Name"]): [*map(Requirement, one.requires or ())]
                for one in importlib.metadata.distributions()}
for gone in map(set, json.loads(sys.argv[1])):
    assert gone < requirements.keys()
    queue = [(name, "") for name in requirements.keys() - gone]
    for name, extra in queue:  # which grows
        for one in requirements.get(name, ()):
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                assert canonical(one.name) not in gone, f"{name} needs {one}"
                queue += {(canonical(one.name), extra) for extra in one.extras} - {*queue}
"""


class TestUsage(Case):
    def usage(self, *arguments: str, path: Sequence[Path] = (), everyone: bool = False,
              **environ: Any) -> tuple[int, str, str]:  # fmt: skip
        """The status of `usage` where self.site holds all that is installed, and what it prints."""
        settings = clean_environ(**{"NO_PROXY": "*", "COLUMNS": "80"} | environ)
        python: Any = {"path": [*map(str, path or [self.site])], "prefix": str(self.folder)}
        with (mock.patch.dict(os.environ, settings, clear=True),
              mock.patch.multiple(sys, **python, meta_path=[*sys.meta_path]),
              mock.patch.object(popcon, "is_set_up", lambda: everyone),
              contextlib.redirect_stdout(io.StringIO()) as out,
              contextlib.redirect_stderr(io.StringIO()) as err):  # fmt: skip
            try:
                status: Any = popcon.main(["usage", *arguments])
            except SystemExit as error:
                status = error.code
        self.assertTrue(out.getvalue().isascii(), out.getvalue())
        said = err.getvalue().replace(f"{ONLY_SESSIONS}\n", "")
        if isinstance(status, str):  # which Python prints
            return 1, out.getvalue(), f"{said}{status}\n"
        return status, out.getvalue(), said

    def printed(self, *arguments: str, **options: Any) -> str:
        """What `usage` prints when it has an answer and nothing to remark."""
        status, out, err = self.usage(*arguments, **options)
        self.assertEqual((status, err), (0, ""))
        return out

    def rows(self, *arguments: str, **options: Any) -> dict[str, dict[str, Any]]:
        rows = json.loads(self.printed("--json", *arguments, **options))
        self.assertEqual([row["library"] for row in rows], sorted({row["library"] for row in rows}))
        return {row.pop("library"): row for row in rows}

    def judged(self, *arguments: str, **options: Any) -> dict[str, str]:
        """Of each library its status, or why it cannot be judged."""
        rows = self.rows(*arguments, **options)
        return {name: row["reason"] or row["status"] for name, row in rows.items()}

    def counts(self, *arguments: str, **options: Any) -> dict[str, int]:
        rows = self.rows(*arguments, **options)
        return {name: row["processes"] for name, row in rows.items() if row["processes"]}

    def fails(self, said: str, *arguments: str, status: int = 1, **environ: Any) -> None:
        """Prove that it prints one short sentence, and nothing of what it was not told."""
        with self.subTest(said, arguments=arguments):
            ended, out, err = self.usage(*arguments, **environ)
            self.assertEqual((ended, out), (status, ""))
            self.assertRegex(err, r"\Apopcon: [ -~]{1,320}\n\Z")
            self.assertRegex(err.rstrip("\n"), said)
            self.assertNotIn("hunter2", err)

    def of(self, since: object = 1.0, **counts: float) -> tuple[str, str]:
        """The arguments that name an exporter's saved metrics with these counts."""
        line = 'python_popcon_library_used{{library="{}"}} {}\n'.format
        text = f"# HELP x\nprocess_start_time_seconds {since}\n"
        self.write(self.folder, {"metrics.txt": text + "".join(starmap(line, counts.items()))})
        return "--metrics", str(self.folder / "metrics.txt")

    def requiring(self, name: str, *requirements: str, **options: Any) -> None:
        lines = "".join(f"Requires-Dist: {text}\n" for text in requirements)
        text = f"Metadata-Version: 2.1\nName: {name}\n{lines}\nRequires-Dist: doc\n"
        more = {"METADATA": text} | options.pop("more", {})
        self.install(name, f"{name}.py", more=more, **options)

    def install_all(self, *names: str) -> None:
        for name in names:
            self.install(name, f"{name}.py")

    def test_json_tells_of_each_library_what_is_documented(self) -> None:
        requirements = "beta", "gone; python_version < '3'", "tester; extra == 'test'"
        self.requiring("Alpha", *requirements, more=PLUGIN)
        for name in ("beta", "tester"):
            self.install(name, f"{name}.py", f"{name}_more/__init__.py", source="pass\n")
        self.install("stubs", "x-stubs/__init__.pyi")

        def size(name: str) -> int:
            return sum(path.stat().st_size for path in self.site.glob(f"{name}-*/*"))

        common = {"version": "1.0", "processes": 0, "required_by": [], "reason": ""}
        expected = {
            "alpha": {"status": "used", "processes": 3, "bytes": size("Alpha")},
            "beta": {"status": "required", "required_by": ["alpha"], "bytes": size("beta") + 10},
            "private": {"status": "absent", "processes": 2, "version": None, "bytes": None},
            "stubs": {"status": "unknown", "reason": "nothing to import", "bytes": size("stubs")},
            "tester": {"status": "unused", "bytes": size("tester") + 10},
        }
        rows = self.rows(*self.of(alpha=3, private=2, gone=0))
        self.assertEqual(rows, {name: common | row for name, row in expected.items()})

    def test_sizes_behind_links_are_those_of_the_files(self) -> None:
        self.write(self.folder, {"cache/linked.py": "x" * 2_000_000})
        self.install("linked", record="linked.py,,\nhard.py,,\ngone.py,,\n")
        for name, link in ("linked.py", os.symlink), ("hard.py", os.link):
            link(self.folder / "cache/linked.py", self.site / name)
        self.assertEqual(self.rows(*self.of(other=1))["linked"]["bytes"], 4_000_000)

    def test_what_a_library_that_stays_requires_stays(self) -> None:
        self.requiring("root", "Mid_Dle[F.ast] (>=1)", "doc; extra == 'doc'", "sub[ a , b ]>1")
        self.requiring("mid.dle", "leaf", 'quick; extra == "F_ast"', "slow; extra=='slow'", "root")
        self.requiring("sub", "one; extra=='a'", "two; (extra == 'b') and os_name != 'x'")
        self.requiring("orphan", "only-orphans")
        self.requiring("broken", "saved ~~~ rubbish [; \\", "also @ https://x/y ; os_name > '3'")
        self.requiring("old", "tight; (extra == 'x')or(os_name >= '3')", "else; os_name == '-'")
        needed = ("also", "else", "leaf", "one", "quick", "saved", "tight", "two")
        self.install_all(*needed, "slow", "doc", "only-orphans")
        unused = ["doc", "only-orphans", "orphan", "slow"]
        metrics = self.of(root=1, broken=1, old=1)
        expected = {"root": "used", "broken": "used", "old": "used"}
        expected |= dict.fromkeys((*needed, "mid-dle", "sub"), "required")
        expected |= dict.fromkeys(unused, "unused")
        self.assertEqual(self.judged(*metrics), expected)
        self.assertEqual(self.printed(*metrics, "--unused").split(), unused)

    def test_what_source_trees_hidden_copies_and_eggs_require_stays(self) -> None:
        self.install_all("leaf", "new", "old", "other", "more", "plain")
        self.write(self.own, {"mine.egg-info/PKG-INFO": "Name: Mine\nVersion: 1.0\n",
                              "mine.egg-info/requires.txt": "leaf\n[x]\nother\n"})  # fmt: skip
        self.write(self.site / "egg-1.0-py3.egg-info", {
            "PKG-INFO": "Name: egg\nRequires-Dist: plain\n",
            "requires.txt": "\n[:python_version >= '3']\nmore\n",
        })  # fmt: skip
        self.requiring("twice", "new")
        self.requiring("twice", "old", folder=self.folder / "shadowed", info="twice-2.dist-info")
        path = [self.own, self.site, self.site, self.folder / "shadowed", self.folder / "none"]
        rows = self.rows(*self.of(twice=1), path=path)
        needed = {"leaf": ["mine"], "more": ["egg"], "plain": ["egg"], "new": ["twice"],
                  "old": ["twice"], "other": [], "egg": [], "twice": []}  # fmt: skip
        self.assertEqual({name: row["required_by"] for name, row in rows.items()}, needed)
        self.assertEqual((rows["other"]["status"], rows["egg"]["status"]), ("unused", "unknown"))
        self.assertEqual((rows["twice"]["version"], rows["egg"]["version"]), ("1.0", "1.0"))

    def test_libraries_that_share_a_module_or_a_command_stay_together(self) -> None:
        self.install("full", "shared/__init__.py", "full.py")
        self.install("skinny", "shared/__init__.py", "LICENSE")
        self.install("other", "other.py", "LICENSE")
        for name in ("tool", "twin"):
            self.install(name, f"{name}.py", "../../bin/run", source="#!/usr/bin/python\n")
        expected = {"full": "used", "twin": "used", "skinny": "required", "tool": "required",
                    "other": "unused"}
        self.assertEqual(self.judged(*self.of(full=1, twin=1), everyone=True), expected)

    def test_what_cannot_be_judged_is_shown_with_the_true_reason(self) -> None:
        expected = {"other": "absent"}

        def add(reason: str, name: str, *files: str, **options: Any) -> None:
            self.install(name, *files, **options)
            expected[name] = reason
            self.assertLessEqual(len(reason), 27)  # to be read in 80 columns

        add("unused", "bundles", "b.py", "bundles.libs/libx-1a2b3c4d.so.3", "lib.abi3.so")
        add("unused", "ends", "ends.py", source="import os\nos.execv('x', [])")
        add("unused", "module", "module/__main__.py", source="signal.raise_signal(15)")
        add("unused", "local", "local.py", more={"direct_url.json": "{}"})
        add("unused", "inner", "inner/x/bin/x.py")
        add("nothing to import", "meta")
        add("holds shared libraries", "gpu-runtime", "gv/__init__.py", "gv/lib/librt.so.12")
        add("holds shared libraries", "winlib", "winlib.py", "winlib/x.dll")
        add("odd paths in its RECORD", "winwheel", record="winwheel\\__init__.py,,\n")
        add("odd paths in its RECORD", "split", "s.py", "../lib64/site-packages/s/x.py")
        add("odd paths in its RECORD", "rooted", record=f"{self.site}/../rooted.py,,\n")
        add("takes part in every start", "starts", "starts.py", "starts.pth")
        add("extends Jupyter", "lab", "lab.py", "../../share/jupyter/labextensions/x.json")
        add("serves Jupyter", "serves", "s2.py", "../../etc/jupyter/jupyter_x.d/x.json")
        add("a plug-in, others find it", "plug", "plug.py", more=PLUGIN)
        add("has no RECORD of its files", "bare", "bare.py", record=None)
        linked = '{"url": "file:///x", "dir_info": {"editable": true}}'
        add("editable, never counted", "mine", "_mine.py", more={"direct_url.json": linked})
        add("runs sessions, or installs", "pip", "pip.py")
        add("to be kept", "kept-one", "kept_one.py")
        add("its metadata have no name", "nobody", "n.py", more={"METADATA": "Version: 1"})
        record = '"\0,\n' + "x" * 200000 + '"\n'
        add("its metadata have no name", "rubbish", more={"METADATA": "\0"}, record=record)
        add(SILENT, "leaves", "l/r.py", source="from os import execvpe", more=COMMAND)
        add(SILENT, "binary", "binary.py", "../../bin/fast", source="\x7fELF")
        python = "#!/usr/bin/python\n"
        add(SILENT, "command", "command.py", more=COMMAND)
        add(SILENT, "script", "script.py", "../../bin/script", source=python)
        add(SILENT, "target", "target.py", "bin/target", source=python)
        keep = *self.of(other=1), "--keep", "Kept_*"
        self.assertEqual(self.judged(*keep), expected)
        # Where every process reports, Python's commands do, but for those that end without.
        expected |= dict.fromkeys(("command", "script", "target"), "unused") | {"module": SILENT}
        self.assertEqual(self.judged(*keep, everyone=True), expected)

    def test_extras_of_what_does_not_report_cannot_be_judged(self) -> None:
        extras = 'renamer; extra == "all"', "langserver[all]; extra == 'x'"
        self.requiring("langserver", *extras, more=COMMAND)
        self.requiring("renamer", "deep")
        self.requiring("bigml", 'viewer; extra == "gui"')
        self.requiring("pip", 'keys; extra == "safe"')
        self.install_all("deep", "viewer", "keys")
        expected = {"bigml": "used", "deep": "required", "viewer": "unused", "langserver": SILENT,
                    "pip": "runs sessions, or installs", "renamer": "optional: langserver",
                    "keys": "optional: pip"}
        self.assertEqual(self.judged(*self.of(bigml=1)), expected)

    def test_what_is_loaded_at_start_or_by_configuration_is_not_called_unused(self) -> None:
        for name in ("drawn", "contents", "kernel", "startup", "remark", "early"):
            self.install(name, f"{name}_module.py")
        self.write(self.folder, {
            "etc/ipython/ipython_config.py": "# such as remark_module\nc.X = 'drawn_module'",
            "etc/ipython/startup/50-x.py": "import startup_module",
            "etc/jupyter/jupyter_server_config.py": "c.ServerApp.x = 'contents_module.Manager'",
            "share/jupyter/kernels/x/kernel.json": '{"argv": ["python", "-m", "kernel_module"]}',
        })  # fmt: skip
        early = types.ModuleType("early_module")
        early.__file__ = str(self.site / "early_module.py")
        named = ("contents", "drawn", "kernel", "startup")
        expected = dict.fromkeys(named, "named in Jupyter's settings")
        expected |= {"early": "loaded at every start", "remark": "unused", "other": "absent"}
        with mock.patch.dict(sys.modules, early_module=early):
            self.assertEqual(self.judged(*self.of(other=1)), expected)

    def test_the_rarely_used_are_told_apart_on_request(self) -> None:
        self.requiring("rare", "rare-need", "unused-need", "base")
        self.requiring("often", "base")
        self.requiring("plug", "plug-need", more=PLUGIN)
        self.install_all("rare-need", "unused-need", "base", "never", "plug-need")
        counts = {"rare": 4, "rare-need": 2, "often": 5, "base": 1, "plug": 1, "private": 1}
        metrics = self.of(**counts, **{"plug-need": 1})
        text = self.printed(*metrics, "--at-most", "4")
        groups = {title: sorted(re.findall(r"(?m)^ +\d+  (\S+)", group))
                  for title, group in re.findall(r"(?s)\n\n([A-Z][^(\n]*) \((.*?)(?=\n\n)", text)}
        self.assertEqual(groups, {
            "Used": ["base", "often", "plug", "plug-need"],
            "Rarely used, by at most 4 processes": ["rare", "rare-need", "unused-need"],
            "Can go": ["never"],
            "Counted, but not installed here": ["private"],
        })  # fmt: skip
        unused = self.printed(*metrics, "--at-most", "4", "--unused").split()
        self.assertEqual(unused, ["never", "rare", "rare-need", "unused-need"])
        self.assertEqual(self.printed(*metrics, "--unused"), "never\n")
        self.assertEqual(self.rows(*metrics, "--at-most", "4"), self.rows(*metrics))

    def test_counts_that_do_not_reach_back_are_no_answer_yet(self) -> None:
        self.install("alpha", "alpha.py")
        young = self.of(since=time.time() - 12 * DAY - 5, other=1)
        said = "No answer yet: the counts reach back 12 of 90 days"
        hint = f"popcon: {said}; ask for a shorter --window if that is long enough\n"
        for shape in ([], ["--json"], ["--unused"], ["--unused", "--at-most", "3"]):
            status, out, err = self.usage(*young, *shape)
            self.assertEqual((status, "alpha" in out, err), (1, "--unused" not in shape, hint))
        _, text, _ = self.usage(*young)
        self.assertEqual(text.splitlines()[-1], said)
        self.assertRegex(text, r"(?m)^   1  alpha .* No answer yet$")
        self.assertEqual(self.printed(*young, "--unused", "--window", "12d"), "alpha\n")
        self.assertIn("12 of 14.5 days", self.usage(*young, "--window", "2w12h")[2])

    def test_the_table_fits_the_terminal_in_ascii(self) -> None:
        self.install_all("alpha", "beta", "delta-" + "x" * 60)
        self.install("gamma", "gamma.py", source="#" * 10_000)
        self.install("plug", "plug.py", more=PLUGIN)
        self.requiring("user", "need")
        self.install("need", "need.py", source="#" * 1_300_000)
        metrics = self.of(alpha=1000, beta=500, private=3, user=1)
        for columns in ("60", "80", "200", "0"):
            text = self.printed(*metrics, COLUMNS=columns)
            self.assertLessEqual(max(map(len, text.splitlines()[:-2])), int(columns) or 80)
            self.assertLessEqual(max(map(len, re.findall("#+", text))), 40)
        for line in (r"\Arank  library +size  processes\n\nUsed \(3, 0\.0 MB\)\n",
                     r"   1  alpha +0\.0 MB      1,000  #{15,}\n   2  beta .* 500  #{8,}\n",
                     r"Can go .*\n   1  gamma +0\.0 MB\n   2  delta-x.*\n",  # first the largest
                     r"\n   1  need +1\.3 MB  user\n",
                     r"\n   1  plug +0\.0 MB  a plug-in, others find it\n",
                     r"\n2 of 7 libraries can go, 0\.0 MB of 1\.3 MB\.\n"):  # fmt: skip
            self.assertRegex(text, line)

    def test_it_says_whose_imports_are_known_and_since_when(self) -> None:
        self.install("alpha", "alpha.py")
        metrics = self.of(beta=1)
        for everyone, who in ((False, "No session"), (True, "Nobody")):
            *_, since, last = self.printed(*metrics, everyone=everyone).splitlines()
            self.assertRegex(since, r"^Counted since 19(70|69)-\d\d-\d\d \d\d:\d\d UTC[+-]\d{4}\.$")
            said = f"{who} has imported them since then, and nothing that stays needs them."
            self.assertEqual(last, said)
        sampled: Any = {"PYTHON_POPCONTEST_STATSD_SAMPLE_RATE": "0.5"}
        ended = self.usage(*metrics, "--unused", "--keep", "alpa", "x*", **sampled)
        told = "popcon: nothing installed is called '{}', which was to be kept\n".format
        rate = "popcon: a sample of 0.5 of the processes reports: rare uses may be missed\n"
        self.assertEqual(ended, (0, "alpha\n", told("alpa") + told("x*") + rate))

    def test_counts_below_k_are_veiled(self) -> None:
        self.install_all("alpha", "beta", "gamma", "never")
        veiled = *self.of(beta=4, alpha=3, gamma=5, private=1), "--at-least", "5"
        rows = re.findall(r"(?m)^ +\d+  ([a-z]+) +(0.0 MB|\?) +(\S+)", self.printed(*veiled))
        expected = [("gamma", "0.0 MB", "5"), ("alpha", "0.0 MB", "<5"), ("beta", "0.0 MB", "<5"),
                    ("private", "?", "<5")]
        self.assertEqual(rows, expected)
        counts = {name: row["processes"] for name, row in self.rows(*veiled).items()}
        none = dict.fromkeys(("alpha", "beta", "private"))
        self.assertEqual(counts, none | {"gamma": 5, "never": 0})

    def test_a_file_of_metrics_is_read_as_the_format_has_it(self) -> None:
        name, now = "python_popcon_library_used", time.time()
        text = f"""process_start_time_seconds 1e+00
process_start_time_seconds{{x="y"}} {now - 3600}
{name}{{library="ruamel.yaml"}} 1
{name}{{x="a}} b\\"\u2028",library="ruamel-yaml"}} 2 1700000000
{name}{{library="rare",sublibrary="no"}} 0.3 # {{trace_id="x"}} 7
{name}_created{{library="no"}} 5
{name}{{sublibrary="no"}} 5
{name}{{library="odd"}} NaN
"""
        self.write(self.folder, {"saved.txt": text, "other.txt": text.replace(name, "a_b_c")})
        saved, other = [("--metrics", str(self.folder / f"{n}.txt")) for n in ("saved", "other")]
        prefix: dict[str, Any] = {"PYTHON_POPCONTEST_STATSD_PREFIX": "a.namespace.x.b-c"}
        counts = {"rare": 1, "ruamel-yaml": 3}
        self.assertEqual(self.counts(*saved, "--window", "1h"), counts)
        self.assertEqual(self.counts(*other, "--window", "60m", **prefix), counts)
        # Of several exporters in a file the youngest tells since when.
        self.assertIn("reach back 0 of 90 days", self.usage(*saved)[2])
        os.utime(saved[1], (now - 3 * DAY,) * 2)
        self.assertIn("popcon: the file is 3 days old", self.usage(*saved, "--unused")[2])

    def test_odd_clocks_and_closed_streams_are_no_traceback(self) -> None:
        self.install("alpha", "alpha.py")
        for since, expected in ((1e300, 1), (-1e300, 0), ("NaN", 1), ("+Inf", 1)):
            status, _, err = self.usage(*self.of(since=since, x=1))
            self.assertEqual((status, err.count("\n")), (expected, expected))
        for stream, out, err in ("stdout", "", f"{ONLY_SESSIONS}\n"), ("stderr", "alpha\n", ""):
            code = f"import popcon, sys; sys.{stream} = None; sys.exit(popcon.main())"
            run = self.run_python(code, "-S", arguments=["usage", *self.of(x=1), "--unused"])
            self.assertEqual((run.returncode, run.stdout, run.stderr), (0, out, err))

    # With a Prometheus of these samples.

    def database(self, **options: Any) -> tuple[Database, tuple[str, ...], list[float]]:
        """A database, arguments that ask it for the last 100 days, and a time on each of them."""
        database = Database(**options)
        arguments = "--prometheus", self.serve(database.answer), "--window", "100d"
        start = round(time.time()) - 3 - 100 * DAY  # the first is half an hour before
        return database, arguments, [start - 1800 + n * DAY for n in range(101)]

    def test_counts_are_exact_through_restarts_markers_and_clocks_that_are_set(self) -> None:
        for is_closed in (False, True):
            database, arguments, days = self.database(is_closed=is_closed)
            first = days[:50]
            second = [first[-1] + 1800, first[-1] + DAY]
            third = [second[-1] + 1800 + 0.5 * n * DAY for n in range(100)]
            # Its clock was set twice, and a marker tells when it ended.
            starts = {when: 5.0 + (n > 9) - 2 * (n > 19) for n, when in enumerate(first)}
            starts |= {first[-1] + 60: math.nan} | dict.fromkeys(second, second[0] - 9)
            database.add(starts | dict.fromkeys(third, third[0] - 9))
            # Once before, and once in each later life.
            database.add(dict.fromkeys([*first, *second, *third], 1.0), library="again")
            before = dict.fromkeys(first, 7.0) | {first[-1] + 60: math.nan}
            database.add(before, library="before")
            database.add({second[-1]: 1.0, second[-1] + 60: math.nan}, library="once")
            for labels in ({"namespace": "prod"}, {}, {"library": "not a name"}):
                database.add({third[-1]: 1.0}, **{"library": "late"} | labels)
            self.assertEqual(self.counts(*arguments), {"again": 2, "late": 2, "once": 1})

    def test_exporters_of_two_clusters_with_the_same_address_are_told_apart(self) -> None:
        database, arguments, days = self.database()
        for cluster, value in (("a", 2.0), ("b", 3.0)):
            times = [when + 0.1 * value * DAY for when in days[:-1]]
            same = dict.fromkeys(times, value)
            database.add(same, cluster=cluster, namespace="mon")
            database.add(same, library="beta", cluster=cluster, namespace="mon")
            rises = dict.fromkeys(times, value) | dict.fromkeys(times[1:], value + 4)
            database.add(rises, library="alpha", cluster=cluster, namespace="prod")
            database.add(dict.fromkeys(times, 0.0), library="idle", cluster=cluster)
        self.install("beta", "beta.py")
        long = '{cluster=~"a|b|' + " " * 2000 + '"}'
        for match, alpha, beta in [("{}", 13, 5), ("{ }", 13, 5), (' {cluster="a", }', 6, 2),
                                   (long, 13, 5)]:
            counts = self.counts(*arguments, "--match", match)
            self.assertEqual(counts, {"alpha": alpha, "beta": beta})
        self.assertEqual({asked[:5] for asked, _ in self.asked if len(asked) > 2000}, {"POST "})
        self.fails("no count of .* rose", *arguments, "--match", '{x="y"}')

    def test_series_that_end_before_their_exporter_are_no_answer(self) -> None:
        self.install_all("alpha", "beta")
        said = "No answer: counters ended before their exporter; give no ttl in its mapping"
        # From which day, with which count, and with which it came back; what is counted of it.
        for begin, gone, back, total in (0, 2, 1, 2), (0, 1, 1, 0), (0, 3, 0, 0), (9, 3, 0, 0):
            with self.subTest(begin=begin, gone=gone, back=back):
                database, arguments, days = self.database()
                database.add(dict.fromkeys(days, 5.0))
                some = dict.fromkeys(days[begin:40], float(gone)) | {days[40]: math.nan}
                some |= dict.fromkeys(days[60:], float(back)) if back else {}
                database.add(some, library="alpha", namespace="one")
                others = dict.fromkeys(days, 1.0) | dict.fromkeys(days[51:], 2.0)
                for library in ["used", "alpha"] if total else ["used"]:
                    database.add(others, library=library, namespace="two")
                ended = self.usage(*arguments, "--unused")
                self.assertEqual(ended, (1, "", f"popcon: {said}\n"))
                self.assertEqual(self.usage(*arguments)[1].splitlines()[-1], said)
                alpha, *_ = json.loads(self.usage(*arguments, "--json")[1])
                self.assertEqual((alpha["library"], alpha["processes"]), ("alpha", total))

    def test_the_counts_reach_back_as_far_as_exporters_and_popcon_were_there(self) -> None:
        self.install("alpha", "alpha.py")
        young, ended = "reach back 12 of 100 days", "reach back 0 of 100 days"
        # From when till when an exporter was scraped, and since when it had a counter.
        for begin, end, counted, said in [(0, 101, 0, ""), (88, 101, 88, young),
                                          (0, 101, 88, young), (0, 91, 0, ended)]:
            with self.subTest(begin=begin, end=end, counted=counted):
                database, arguments, days = self.database()
                database.add(dict.fromkeys(days[begin:end], 5.0))
                counts = {when: 1.0 + n for n, when in enumerate(days[counted:end])}
                database.add(counts, library="other")
                status, out, err = self.usage(*arguments, "--unused")
                self.assertEqual((status, out), (1, "") if said else (0, "alpha\n"))
                self.assertIn(said, err)

    def test_where_restarts_are_not_known_too_much_is_counted(self) -> None:
        self.install("alpha", "alpha.py")
        database, arguments, days = self.database()
        database.add(dict.fromkeys(days, 9.0), library="other")
        rows = self.rows(*arguments)
        found = {name: (row["status"], row["processes"]) for name, row in rows.items()}
        self.assertEqual(found, {"alpha": ("unused", 0), "other": ("absent", 9)})

    # With servers that answer oddly, and with wrong arguments.

    def serve(self, answer: Callable[[str], tuple[int, dict[str, str], bytes]]) -> str:
        """The address of a web server that answers so; what it was asked is in self.asked."""
        asked: list[tuple[str, dict[str, str]]] = []

        class Handler(BaseHTTPRequestHandler):
            log_message = mock.Mock()

            def do_GET(self) -> None:
                form = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                path = f"{self.path}?{form}" if form else self.path  # of a POST
                asked.append((f"{self.command} {path}", dict(self.headers)))
                status, headers, body = answer(path)
                self.send_response(status)
                for pair in headers.items():
                    self.send_header(*pair)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

        self.asked = asked
        server = self.open(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        self.addCleanup(server.shutdown)
        return f"http://127.0.0.1:{server.server_port}"

    def test_odd_answers_get_one_sentence_and_no_traceback(self) -> None:
        def series(*labels: Any, **more: Any) -> bytes:
            return json.dumps({"status": "success", "data": labels} | more).encode()

        def result(*value: Any) -> bytes:
            return json.dumps({"data": {"result": [{"metric": good, "value": value}]}}).encode()

        def check(said: str, status: int, headers: dict[str, str], *bodies: bytes) -> None:
            """Answer with these to the question for the series, and to others."""
            url = self.serve(lambda asked: (status, headers, bodies["/series" not in asked]))
            self.fails(said, "--prometheus", url)

        good = {"library": "alpha", "job": "x\33"}
        page = b"<!DOCTYPE html><title>Log\33[2Jin</title>" * 100
        moved = {"Location": "https://login.example/\33[2J"}
        strange, none = "does not answer as Prometheus does, but '", "no count of .* rose in 90 d"
        cut, chunked = "cannot be read: .*(cut off|Incomplete)", {"Transfer-Encoding": "chunked"}
        for body in (page, b"", b"[1, 2]", b"[" * 100000, series(5), series(good)[:-2]):
            check(strange, 200, {}, body)
        for body in (result(1, []), result(1, None)):
            check(strange, 200, {}, series(good), body)
        for odd in ((1, "NaN"), (math.nan, "1"), (1e300, "1"), (1, "Inf")):
            check(none, 200, {}, series(good), result(*odd))
        for body in (series(good), series(), series(good, warnings=["PromQL warning: x"])):
            check(none, 200, {}, body, b'{"data": {"result": []}}')
        check("not know all: a store is out", 200, {}, series(good, warnings=["a store is out"]))
        check(r"answers 302 Found https://login.example/ \[2J$", 302, moved, b"")
        check("answers 400 .* parse error: .*x", 400, {}, b'{"error":"parse error: \\"x\\""}')
        check("answers 401 Unauthorized$", 401, {}, page)
        check("answers 503 Service Unavailable$", 503, {}, b"[]")
        check(cut, 200, {"Content-Length": "9"}, b"{")
        check(cut, 200, chunked, b"ff\r\n{")
        check(cut, 503, chunked, b"no size")

    def test_sources_that_cannot_be_read_get_one_sentence(self) -> None:
        nowhere, (_, metrics) = f"http://127.0.0.1:{free_port()}", self.of(alpha=1, beta=1)
        whole, short = Path(metrics).read_bytes(), self.folder / "part.txt"
        short.write_bytes(whole[:-1])
        length = {"Content-Length": str(len(whole))}
        page = self.serve(lambda asked: (200, {}, b"<!DOCTYPE html>"))
        cut_off = self.serve(lambda asked: (200, length, whole[:-22]))
        served = self.serve(lambda asked: (200, {}, whole))
        for said, *arguments in [
            ("cannot be read: .*refused$", "--prometheus", nowhere),
            ("cannot be read: nonnumeric port", "--prometheus", "http://x:y"),
            ("cannot be read: ", "--prometheus", f"file://{short}#"),
            ("cannot be read: unknown url type", "--prometheus", "prometheus:9090"),
            ("cannot be read: Invalid IPv6 URL", "--metrics", "http://[::1"),
            ("metrics cannot be .*refused$", "--metrics", f"{nowhere}/metrics?token=hunter2"),
            ("no exporter's metrics, or cut off: '<!DOC", "--metrics", f"{page}/?token=hunter2"),
            ("No such file", "--metrics", "/no/such/file"),
            ("is no exporter's metrics", "--metrics", "/"),
            ("is no .* or cut off", "--metrics", str(short)),
            ("its answer is cut off", "--metrics", cut_off),
            (r"no count of a\(b rose in 90 d", "--metrics", metrics, "--metric", "a(b"),
            ("no count of x rose", "--metrics", f"{served}/?hunter2", "--metric", "x"),
        ]:
            self.fails(said, *arguments)
        wrong: Any = {"PYTHON_POPCONTEST_STATSD_PREFIX": "a b"}
        self.fails("PYTHON_POPCONTEST_STATSD_PREFIX='a b': must", "--metrics", metrics, **wrong)

    def test_wrong_usage_gets_one_sentence(self) -> None:
        metrics, server = self.of(x=1), ("--prometheus", "http://127.0.0.1:9")
        self.fails("one of the arguments --prometheus --metrics is required", status=2)
        self.fails("not allowed with argument", *metrics, *server, status=2)
        self.fails("not allowed with argument", *metrics, "--unused", "--json", status=2)
        self.fails("invalid int value", *metrics, "--at-least", "few", status=2)
        for text in ("", "90", "d", "1.5d", "5 d"):
            self.fails("--window: invalid seconds value", *metrics, "--window", text, status=2)
        self.fails("--match is for --prometheus", *metrics, "--match", "{a='b'}")
        said = "must be as in PromQL, .* and not about the library"
        for text in ("{}x", '{a="b"', "x{}", '{library="numpy"}', '{ library =~ "a.*" }',
                     "{a='b',library!~`x`}", '{"library"!="x"}', "{'library' = 'x'}"):  # fmt: skip
            self.fails(said, *server, "--match", text)
        bad = self.folder / "bad.txt"
        bad.write_text("hunter2\n")
        for text in ("hunter2", "X: hunter2\u20ac", "a b: hunter2", "@/no/such/file", f"@{bad}"):
            self.fails("must be 'Name: value', or @FILE", *server, "--header", text)

    def test_a_header_is_sent_and_never_told(self) -> None:
        self.write(self.folder, {"secret.txt": "Authorization: Bearer hunter2\r\n\nX-Two: b\n"})
        for secret in ("Authorization: Bearer hunter2", f"@{self.folder / 'secret.txt'}"):
            url = self.serve(lambda asked: (400, {}, b'{"error": "wrong"}'))
            given = "--header", "X-Scope-OrgID: a", "--header", secret
            self.fails("answers 400 .*wrong$", "--prometheus", f"{url}/tenant/", *given)
            ((path, headers),) = self.asked
            self.assertTrue(path.startswith("GET /tenant/api/v1/series?"), path)
            self.assertEqual(headers["Authorization"], "Bearer hunter2")
            self.assertEqual(headers["X-Scope-Orgid"], "a")

    # With real servers, and in a large environment.

    def real_server(self, path: str, *ports: int) -> str:
        """Start a server that scrapes these ports each second, and return its address."""
        folder, address = self.folder / f"server-{free_port()}", f"127.0.0.1:{free_port()}"
        jobs = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
        scrape = {"job_name": "popcon", "scrape_interval": "1s", "static_configs": jobs}
        self.write(folder, {"config.yml": json.dumps({"scrape_configs": [scrape]})})  # it is YAML
        names = ["config.file", "storage.tsdb.path", "web.listen-address"]
        if path == VICTORIAMETRICS:
            names = ["promscrape.config", "storageDataPath", "httpListenAddr"]
        values = folder / "config.yml", folder / "data", address
        self.start(path, *(f"--{name}={value}" for name, value in zip(names, values)))
        return f"http://{address}"

    def wait_for_scrapes(self, urls: list[str]) -> None:
        """Wait until the servers tell of both exporters what they showed a second ago."""
        begin = time.time()
        query = f"count(timestamp(up) > {begin + 1} and up == 1) == 2"
        for url in urls:
            found: object = None
            options = types.SimpleNamespace(prometheus=url, header=[])
            while not found:
                self.assertLess(time.time(), begin + 60, f"{url} does not scrape")
                time.sleep(0.3)
                with contextlib.suppress(OSError):
                    found = popcon.ask(options, "query", query=query)

    @unittest.skipUnless(EXPORTER and SERVERS, "needs POPCON_TEST_STATSD_EXPORTER and servers")
    def test_real_servers_give_exact_counts_whatever_restarts(self) -> None:
        self.install_all("before", "again", "once", "twice", "everywhere", "spaces", "never")

        def use(port: int, *names: str, space: str = "") -> None:
            prefix = f"python_popcon.{space and f'namespace.{space}.'}library_used"
            popcon.send([popcon.statsd_line(name, prefix) for name in names], "127.0.0.1", port)

        other, port = self.open(self.exporter())[1].place
        with self.exporter() as (_, metrics):
            first = metrics.place
            urls = [self.real_server(path, first[1], port) for path in SERVERS]
            use(first[0], "before", "again")
            use(first[0], "before", space="prod")
            self.wait_for_scrapes(urls)
            start = time.time()
            time.sleep(2)  # so that a slow machine, which asks a bit later, misses no first scrape
            use(first[0], "again", "once", "twice", "everywhere")
            use(other, "everywhere")
            use(first[0], "spaces", space="prod")
            use(first[0], "spaces", "spaces", space="test")
            self.wait_for_scrapes(urls)
        self.open(self.exporter(first))
        self.wait_for_scrapes(urls)
        use(first[0], "twice")
        self.wait_for_scrapes(urls)
        for url, path in zip(urls, SERVERS):
            with self.subTest(server=path):
                self.check_server(url, start)

    def check_server(self, url: str, start: float) -> None:
        def since_then(*arguments: str) -> tuple[str, ...]:
            window = f"{(time.time() - start) * 1000:.0f}ms"
            return "--prometheus", url, "--window", window, *arguments

        expected = {"again": 1, "once": 1, "twice": 2, "everywhere": 2, "spaces": 3}
        self.assertEqual(self.counts(*since_then()), expected)
        some = self.counts(*since_then("--match", '{namespace="prod"}'))
        self.assertEqual(some, {"spaces": 1})
        self.assertEqual(self.printed(*since_then("--unused")), "before\nnever\n")
        # All there is, for people who ask for more than that.
        self.fails("reach back 0 of 90 days", "--prometheus", url, "--unused")
        self.fails("no count of .* rose", *since_then("--match", '{x="y"}'))
        self.fails("answers (400|422) .*:", *since_then("--match", '{x=~"("}'))

    @unittest.skipUnless(LARGE, "needs POPCON_TEST_LARGE, the python of a large environment")
    def test_nothing_that_stays_needs_what_can_go_in_a_large_environment(self) -> None:
        names = ("pandas", "scikit-learn", "matplotlib", "requests", "ruamel-yaml", "spacy")
        metrics = self.of(**dict.fromkeys((*names, "google-cloud-storage"), 1))

        def run(code: str, *arguments: str) -> str:
            ended = self.run_python(code, "-W", "ignore", python=LARGE, arguments=[*arguments])
            self.assertEqual(ended.returncode, 0, ended.stderr)
            self.assertIn(ended.stderr, ("", f"{ONLY_SESSIONS}\n"))
            return ended.stdout

        lists = []
        for before in ("pass", "popcon.setup_reporter()"):
            code = f"import popcon; {before}; popcon.main()"
            rows = json.loads(run(code, "usage", *metrics, "--json"))
            self.assertGreater(len(rows), 500)
            lists.append([row["library"] for row in rows if row["status"] == "unused"])
        self.assertGreater(len(lists[0]), 20)
        self.assertLess(set(lists[0]), set(lists[1]))  # where all report, commands can be judged
        run(STAYS, json.dumps(lists))


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
            self.assertIn(reason.removesuffix("NAME"), source)

    def test_each_block_of_code_has_a_test(self) -> None:
        # The datagram and the sample table; what the tests below run, in this order.
        languages = Counter(re.findall(r"(?m)^ *```(\w+)$", README))
        tested = {
            "text": 2,
            "sh": 6,
            "ini": 1,
            "dockerfile": 1,
            "python": 1,
            "yaml": 3,
            "json": 1,
            "promql": 1,
        }
        self.assertEqual(languages, tested)


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
        script = readme_block("sh", "python popcon.py selftest")
        # Of the tests not all once more, but two that are skipped.
        script = script.replace("unittest", "unittest -k test_the_dashboard")
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
        self.install("never", "never.py")
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
        ):
            self.assertIn(words, " ".join(sample.split()))
            self.assertIn(words, ended.stdout)

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
        self.assertIs(options.run, popcon.collect)

    # Switch it on.

    def test_the_dockerfile_switches_it_on(self) -> None:
        shutil.copy(SOURCE, self.own)
        dockerfile = readme_block("dockerfile", "FROM")
        (command,) = re.findall("(?m)^RUN (.*)$", dockerfile)
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

    def test_the_line_for_mpi_lets_one_rank_report(self) -> None:
        (line,) = (code for code in inline_code() if code.startswith('[ "${OMPI'))
        for variable in ("OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
            for rank, opted_out in (("0", ""), ("1", "1")):
                with self.subTest(variable, rank=rank):
                    script = f"set -e\n{line}\necho $DO_NOT_TRACK"
                    ended = self.run_in_shell(f"export {variable}={rank}\n{script}")
                    self.assertEqual(ended.returncode, 0)
                    self.assertEqual(ended.stdout, f"{opted_out}\n")
        ended = self.run_in_shell(f"{line}\necho $DO_NOT_TRACK")
        self.assertEqual(ended.stdout, "\n")

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
        (query,) = readme_blocks("promql")
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
