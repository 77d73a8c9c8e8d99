"""The tests of popcon: `python -m unittest`. They follow the rooms of popcon.py.

Those that need a real server, a kernel, Debian's Python or a large environment are told where by
POPCON_TEST_* variables, as .ci/run sets them, and are skipped without.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.machinery
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
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import starmap
from pathlib import Path
from typing import Any
from unittest import mock

import popcon

HERE = Path(__file__).resolve().parent
SOURCE = Path(popcon.__file__).resolve()
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
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"(?ms)^ *```{language}\n(.*?)^ *```$", text)


def readme_start_up() -> str:
    (lines,) = (block for block in readme_blocks("python") if "except" in block)
    return lines


def readme_mapping() -> str:
    (mapping,) = (block for block in readme_blocks("yaml") if block.startswith("mappings:"))
    return mapping


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Server:
    """A statsd server that only listens."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.bind((address, 0))
        self.port = self.socket.getsockname()[1]
        self.settings: dict[str, Any] = {
            "PYTHON_POPCONTEST_STATSD_HOST": address,
            "PYTHON_POPCONTEST_STATSD_PORT": str(self.port),
        }

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()

    def received(self, wait: float = 0.0) -> list[bytes]:
        """What came since the last call; loopback delivers before the sender goes on."""
        datagrams = []
        self.socket.settimeout(wait)
        with contextlib.suppress(BlockingIOError, TimeoutError):
            while True:
                datagrams.append(self.socket.recv(65536))
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
        meta = {f"{info}/{path}": text for path, text in ({"METADATA": text} | (more or {})).items()}
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
        with mock.patch.object(sys, "path", [str(folder)]):
            return {*popcon.owners(files, files)}

    def run_python(
        self, code: str, *flags: str, cwd: Path | None = None, python: str = sys.executable,
        arguments: list[str] | None = None, **settings: str,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run the code, or the script of that name, in a fresh Python that finds self.site."""
        path = os.pathsep.join([str(self.site), str(HERE)])
        program = [code] if code.endswith(".py") else ["-c", textwrap.dedent(code)]
        return subprocess.run(
            [python, *flags, *program, *(arguments or [])],
            env=clean_environ(**{"PYTHONPATH": path} | settings),
            cwd=cwd or self.own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

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

    @contextlib.contextmanager
    def exporter(self, place: tuple[int, int] = (0, 0)) -> Iterator[tuple[dict[str, Any], Any]]:
        """The real statsd_exporter: the settings for it, and a function that gives its metrics.

        Takes the ports for statsd and for the metrics, if it is to take another's place; they
        are the function's `place`.
        """
        (self.folder / "mapping.yaml").write_text(readme_mapping(), encoding="utf-8")
        statsd, port = place if place[0] else (free_port(socket.SOCK_DGRAM), free_port())
        settings = {"PYTHON_POPCONTEST_STATSD_HOST": "127.0.0.1"}
        settings["PYTHON_POPCONTEST_STATSD_PORT"] = str(statsd)
        url = f"http://127.0.0.1:{port}/metrics"
        options = {
            "statsd.mapping-config": self.folder / "mapping.yaml",
            "statsd.listen-udp": f"127.0.0.1:{statsd}",
            "statsd.listen-tcp": "",
            "statsd.read-buffer": 4194304,
            "web.listen-address": f"127.0.0.1:{port}",
        }
        command = [EXPORTER, *(f"--{name}={value}" for name, value in options.items())]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

        def metrics() -> dict[str, float]:
            with urllib.request.urlopen(url, timeout=5) as answer:
                lines = answer.read().decode().splitlines()
            samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
            return {name: float(value) for name, _, value in samples}

        metrics.place = statsd, port  # type: ignore[attr-defined]
        try:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    metrics()
                    break
                time.sleep(0.1)
            yield settings, metrics
        finally:
            process.kill()
            process.wait()


# ---- sys.modules -> the files that were executed ------------------------------------


class TestWhatCounts(Case):
    def test_a_package_a_single_file_and_an_extension_count(self) -> None:
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        self.install("Alpha", "alpha/__init__.py", "alpha/part.py")
        self.install("beta", "beta.py")
        self.install("cffi-like", f"_cffi_like{suffix}")
        self.install("unused", "unused.py")
        self.assertEqual(self.used("import alpha.part, beta"), {"alpha", "beta"})
        self.assertEqual(self.owners(f"_cffi_like{suffix}"), {"cffi-like"})
        by_hand = f"""
            import _csv, importlib.util, os, shutil
            shutil.copy(_csv.__file__, {str(self.site / "_twin")!r} + {suffix!r})
            spec = importlib.util.spec_from_file_location("_csv", {str(self.site / "_twin")!r} + {suffix!r})
            sys.modules["_twin"] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            """
        if "_csv" not in sys.builtin_module_names and hasattr(__import__("_csv"), "__file__"):
            self.install("twin", record=f"_twin{suffix},,\n")
            self.assertEqual(self.used(by_hand), {"twin"})

    def test_names_are_normalised_as_pep_503_says(self) -> None:
        right = {"ruamel.yaml": "ruamel-yaml", "A__b-.c": "a-b-c", "PyYAML": "pyyaml", "2to3": "2to3"}
        wrong = ["", "a b", "a:1|c\nb", "é", "\u212aafka", "-", "a/b", "²", "x" * 201]
        for name, expected in {**right, **dict.fromkeys(wrong, "")}.items():
            self.assertEqual(popcon.normalized(name), expected)

    def test_only_libraries_that_own_the_imported_files_count(self) -> None:
        self.install("google-cloud-storage", "google/cloud/storage/__init__.py")
        self.install("google-cloud-bigquery", "google/cloud/bigquery/__init__.py")
        self.install("google-auth", "google/auth/__init__.py")
        self.install("host", "host/__init__.py")
        self.install("guest", "host/plugins/guest.py", "guest_tool.py")
        for name in ("opencv-python", "opencv-python-headless"):
            self.install(name, "cv2/__init__.py")
        self.write(self.site, {"dropped.py": "", "host/dropped.py": ""})
        self.write(self.own, {"guest_tool.py": "", "mine/__init__.py": ""})
        for code, expected in [
            ("import google.cloud.storage", {"google-cloud-storage"}),
            ("import host", {"host"}),
            ("import host.plugins.guest", {"host", "guest"}),
            ("import cv2", {"opencv-python", "opencv-python-headless"}),
            ("import dropped", set()),
            ("sys.path.insert(0, ''); import guest_tool, mine", set()),
            ("import json, csv, decimal, sqlite3, xml.dom.minidom, concurrent.futures", set()),
        ]:
            with self.subTest(code=code):
                self.assertEqual(self.used(code), expected)
        self.assertEqual(self.used("import google.auth", before="import google.cloud.storage"), {"google-auth"})

    def test_source_trees_and_editable_installs_never_count(self) -> None:
        for meta in ("mine.egg-info/PKG-INFO", "mine-1.0.dist-info/METADATA"):
            top = str(Path(meta).parent / "top_level.txt")
            self.write(self.own, {"mine.py": "", meta: "Name: mine\n", top: "mine\n"})
        editable = {"direct_url.json": '{ "dir_info" :\n{ "editable" : true } }'}
        self.install("edited", "__editable___edited_finder.py", more=editable)
        self.install("copied", "copied.py", more={"direct_url.json": '{"dir_info": {}}'})
        code = "sys.path.insert(0, ''); import mine, __editable___edited_finder, copied"
        self.assertEqual(self.used(code), {"copied"})

    def test_lazy_modules_do_not_count_until_touched_and_stay_asleep(self) -> None:
        self.install("sleepy", "sleepy.py", source="value = 1; print('woken')")
        lazily = textwrap.dedent("""
            import importlib.util
            spec = importlib.util.find_spec("sleepy")
            spec.loader = importlib.util.LazyLoader(spec.loader)
            sleepy = sys.modules["sleepy"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sleepy)
            """)
        imported = """
            import importlib.machinery, importlib.util
            class Finder(importlib.machinery.PathFinder):
                @classmethod
                def find_spec(cls, name, path=None, target=None):
                    spec = super().find_spec(name, path, target) if name == "sleepy" else None
                    if spec: spec.loader = importlib.util.LazyLoader(spec.loader)
                    return spec
            sys.meta_path.insert(0, Finder)
            import sleepy
            """
        self.assertEqual(self.used(imported), set())
        self.assertEqual(self.used(lazily), set())
        self.assertEqual(self.used(lazily + "sleepy.value"), {"woken", "sleepy"})
        self.assertEqual(self.used("sleepy.value", before=lazily), {"woken", "sleepy"})

    def test_a_module_run_with_m_counts_and_a_script_does_not(self) -> None:
        source = "import popcon; print(popcon.used_libraries() & {'tool'})"
        self.install("tool", "tool.py", source=source)
        self.write(self.own, {"script.py": source})
        for arguments, expected in ((["-m", "tool"], "{'tool'}\n"), (["script.py"], "set()\n")):
            path = f"{self.site}{os.pathsep}{HERE}"
            ended = subprocess.run(
                [sys.executable, *arguments], env=clean_environ(PYTHONPATH=path), cwd=self.own,
                capture_output=True, text=True,
            )  # fmt: skip
            self.assertEqual(ended.stdout, expected)

    def test_what_modules_make_of_themselves_does_not_mislead(self) -> None:
        self.install("alpha", "alpha/__init__.py")
        self.install("beta", "beta.py")
        self.write(self.site, {"alpha/late.py": ""})
        for code, expected in [
            ("sys.modules['x.y.z'] = alpha; alpha.__file__ = '/x/beta.py'", {"alpha"}),
            ("import importlib.util as u; alpha.__spec__ = u.find_spec('beta')", {"alpha"}),
            ("del alpha.__spec__", {"alpha"}),
            ("del alpha.__file__", {"alpha"}),
            ("del alpha.__builtins__", {"alpha"}),
            ("alpha.__file__ = alpha.__spec__.origin = 5", set()),
        ]:
            with self.subTest(code=code):
                self.assertEqual(self.used(f"import alpha; {code}"), expected)
        for item in (
            "class Self:\n    def __getattr__(self, name): sys.exit('woken')\nitem = Self()",
            "class Self(types.ModuleType):\n    def f(self): pass\nitem = Self('module')",
            "def item(): pass",
            "class item:\n    @classmethod\n    def f(self): pass",
            "class Self(dict):\n    def __init__(self): self.__dict__ = self\nitem = Self()",
            "item = types.ModuleType(__name__); item.__spec__ = __spec__",
            "item = types.ModuleType(__name__); item.__file__ = __file__",
        ):
            source = f"import sys, types\n{item}\nsys.modules[__name__] = item"
            self.install("self", "itself.py", source=source)
            with self.subTest(item=item):
                self.assertEqual(self.used("import itself"), {"self"})

    def test_a_module_made_of_a_file_that_nobody_executed_neither_counts_nor_hides(self) -> None:
        self.install("first", "shared/__init__.py", "shared/first.py")
        self.install("second", "shared/second.py")
        # So do the *-nspkg.pth files that setuptools has written for namespace packages.
        made = textwrap.dedent("""
            import importlib.machinery, importlib.util
            spec = importlib.machinery.PathFinder.find_spec("shared")
            shared = sys.modules.setdefault("shared", importlib.util.module_from_spec(spec))
            """)
        self.assertEqual(self.used("import shared.second", before=made), {"second"})
        self.assertEqual(self.used("import shared.first", before=made), {"first"})
        self.assertEqual(self.used(made + "import shared.second"), {"second"})

    def test_what_is_no_module_costs_nobody_a_count_and_is_never_run(self) -> None:
        self.install("alpha", "alpha.py")
        self.install("numpy", "numpy/__init__.py")
        code = """
            import types, importlib.machinery
            def boom(*ignored): print("executed"); raise SystemExit(3)
            class Evil:
                __getattribute__ = __eq__ = __ne__ = __hash__ = __str__ = __repr__ = boom
                __bool__ = __len__ = __iter__ = __fspath__ = __dir__ = __call__ = boom
            class EvilModule(types.ModuleType):
                __getattribute__ = __getattr__ = __eq__ = __hash__ = boom
            class EvilMeta(type):
                __getattribute__ = __eq__ = __hash__ = boom
            class Held:
                __dict__ = property(boom)
            class EvilSpec(importlib.machinery.ModuleSpec):
                __getattribute__ = boom
            liar = types.ModuleType("liar")
            liar.__spec__ = liar.__path__ = liar.__loader__ = liar.__package__ = liar.__file__ = Evil()
            named = types.ModuleType("named")
            named.__spec__ = importlib.machinery.ModuleSpec("named", None)
            named.__spec__.name = named.__spec__.origin = Evil(); named.__spec__.has_location = True
            specced = types.ModuleType("specced"); specced.__spec__ = EvilSpec("specced", None)
            empty = types.ModuleType.__new__(types.ModuleType)
            sys.modules.update(nothing=None, evil=Evil(), module=EvilModule("numpy"),
                meta=EvilMeta("numpy", (), {})(), kind=EvilMeta("numpy", (), {}), hidden=Held(),
                number=5, text="numpy", liar=liar, named=named, specced=specced, empty=empty,
                numpy=types.ModuleType("numpy"))
            sys.modules[7] = sys.modules[("numpy",)] = sys.modules[None] = sys
            import alpha
            """
        self.assertEqual(self.used(code), {"alpha"})

    def test_paths_may_be_anything(self) -> None:
        self.install("alpha", "alpha.py")
        paths = "[None, 5, b'x', '', '/nowhere', '/', 'relative', '\\0']"
        os.mkfifo(self.folder / "pipe")
        none = "importlib.metadata.packages_distributions = importlib.metadata.distributions = print"
        for code in (
            f"sys.path[:] = {paths}",
            "sys.path = None",
            *(
                f"import importlib.metadata, types; {none}; odd = sys.modules['odd'] = "
                f"types.ModuleType('odd'); odd.__file__ = {file!r}"
                for file in ("<string>", "odd", "alpha.py", "\0/x.py", "/tmp/\ud800/x.py",
                             f"{self.site}/\ud800.py", "/dev/null/x.py", f"{self.folder}/pipe/x.py")
            ),
        ):  # fmt: skip
            with self.subTest(code=code):
                self.assertEqual(self.used(f"import alpha; {code}"), {"alpha"})

    def test_a_relative_folder_on_sys_path_counts_after_a_change_of_folder(self) -> None:
        self.install("alpha", "alpha.py", folder=self.own / "libs")
        code = "sys.path.insert(0, 'libs'); import alpha, os; os.chdir('/')"
        self.assertEqual(self.used(code), {"alpha"})

    @unittest.skipUnless(os.name == "posix", "needs file names as POSIX has them")
    def test_a_file_name_that_the_encoding_does_not_hold_counts(self) -> None:
        self.install("accents", "é/__init__.py")
        code = "import importlib; importlib.import_module(b'\\xc3\\xa9'.decode(sys.getfilesystemencoding(), 'surrogateescape'))"
        for settings in ({}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
            with self.subTest(settings=settings):
                self.assertEqual(self.used(code, **settings), {"accents"})

    def test_bytecode_in_place_of_sources_counts(self) -> None:
        self.install("alpha", "alpha.py")
        self.install("beta", "beta/__init__.py")
        for path in list(self.site.rglob("*.py")):
            py_compile.compile(str(path), f"{path}c", doraise=True)
            path.unlink()
        self.assertEqual(self.used("import alpha, beta"), {"alpha", "beta"})

    def test_a_folder_within_another_belongs_to_the_outer_one_first(self) -> None:
        self.install("pywin32", "win32/lib/win32con.py")
        inner = self.site / "tools" / "_vendor"
        self.install("vendored", "vendored/__init__.py", folder=inner)
        self.install("tools", record="tools/_vendor/vendored/__init__.py,,\n")
        self.install("added", "added.py", folder=inner)  # by pip install --target
        for folder, module, expected in [
            (self.site / "win32" / "lib", "win32con", {"pywin32"}),
            (inner, "vendored", {"tools"}),
            (inner, "added", {"added"}),
            (inner, "vendored, added", {"tools", "added"}),
        ]:
            with self.subTest(module=module):
                code = f"sys.path.append({str(folder)!r}); import {module}"
                self.assertEqual(self.used(code), expected)

    def test_several_folders_each_with_its_metadata(self) -> None:
        target = self.folder / "target"
        self.install("alpha", "alpha.py", folder=target)
        self.install("beta", "beta.py")
        self.install("alpha-two", "alpha.py")
        path = os.pathsep.join(map(str, [target, self.site, HERE]))
        self.assertEqual(self.used("import alpha, beta", PYTHONPATH=path), {"alpha", "beta"})
        code = f"sys.path.insert(0, {str(target)!r}); import alpha; del sys.path[0]"
        self.assertEqual(self.used(code), {"alpha"})


# ---- files -> the libraries that own them -------------------------------------------


class TestMetadata(Case):
    def test_record_is_read_as_csv_says(self) -> None:
        for record, is_listed in [
            ('"a/b.py","sha256=x","1"\n', True),
            ("a/b.py\n", True),
            ('"c,d.txt",sha256=x,1\na/b.py,sha256=y,2\n', True),
            ("a/b.py,,\r\nc.py,,\r\n", True),
            ("c.py,,\r\na/b.py,,\r\n", True),
            ('"q""uoted",,\na/b.py,,', True),
            ("zzz.py,,\nc/b.py,,\na/b.py,,\nd/e.py,,", True),  # unsorted
            ('"x,a/b.py",,\n"a/b.py,x",,\n', False),
            ("a/b.pyi,,\na/b.py.bak,,\na/b.py#,,\na/bb.py,,\naa/b.py,,\nx/a/b.py,,\n", False),
        ]:
            with self.subTest(record=record):
                self.install("alpha", record=record)
                self.assertEqual(self.owners("a/b.py"), {"alpha"} if is_listed else set())
                self.assertEqual(self.owners("b.py", "d.txt"), set())

    def test_the_name_is_the_metadatas(self) -> None:
        for text, name in [
            ("Name: Real.Name\n", "real-name"),
            ("\nMetadata-Version: 2.1\nName: blank\n", "blank"),
            ("\r\n\r\nName: crlf\r\n\r\nName: x\r\n", "crlf"),
            ("\n\nName: two\n", "two"),
            (f"Summary: {'x' * 5000}\nname:   far\n", "far"),
            ("Version: 1\n\nName: x\n", ""),
            ("Name: evil:1|c\nevil\n", ""),
            ("", ""),
        ]:
            with self.subTest(text=text[:30]):
                info = self.install("x", "alpha.py", info="other-1.0.dist-info", more={"METADATA": text})
                self.assertEqual(self.owners("alpha.py"), {name} - {""})
                self.assertEqual(popcon.library_name(str(info)), name)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "needs os.mkfifo")
    def test_rubbish_costs_only_the_distribution_it_is_in(self) -> None:
        self.install("good", "good.py")
        rubbish: list[dict[str, bytes]] = [
            {"RECORD": bytes(range(256)) * 99, "METADATA": bytes(range(256))},
            {"RECORD": b"good.py,,\n"},
            {"RECORD": b"good.py,,\n", "METADATA": b"Name: a\x00b\n"},
            {"RECORD": b"good.py,,\n", "METADATA": "Name: bös\n".encode("latin-1")},
            {"RECORD": b'"good.py\n\x00,,', "METADATA": b"Name: nul\n"},
            {"RECORD": b'"' + 200_000 * b"x", "METADATA": b"Name: long\n"},
            {"RECORD": b"/etc/passwd,,\n../../x.py,,\n../good.py,,\n", "METADATA": b"Name: dots\n"},
            {"RECORD": b"\n\n,,\n,\n", "METADATA": b"Name: void\n"},
            {"RECORD": b"\xff\xfeg\x00o\x00", "METADATA": b"Name: utf16\n"},
        ]
        for number, files in enumerate(rubbish):
            info = self.site / f"rubbish{number}-1.0.dist-info"
            info.mkdir()
            for name, content in files.items():
                (info / name).write_bytes(content)
        (self.site / "file.dist-info").write_text("a file where a folder belongs")
        for name in ("Ünïcode-1.dist-info", ".dist-info", "pipe-1.dist-info", "zero-1.dist-info"):
            (self.site / name).mkdir()
        (self.site / "folder-1.dist-info" / "RECORD").mkdir(parents=True)
        (self.site / "loop-1.dist-info").symlink_to(self.site / "loop-1.dist-info")
        (self.site / "zero-1.dist-info" / "RECORD").symlink_to("/dev/zero")
        os.mkfifo(self.site / "pipe-1.dist-info" / "RECORD")  # reading it must not block
        self.assertEqual(self.owners("good.py"), {"good"})

    def test_fuzzed_records_agree_with_a_plain_reading(self) -> None:
        draw = random.Random(1)
        names = ["a", "b", "a-b", "a_b", "aa", "B", "_a", "é"]
        for round_ in range(100):
            shutil.rmtree(self.site)
            self.site.mkdir()
            expected = {}
            paths = {"/".join(draw.choices(names, k=draw.randint(1, 3))) + ".py" for _ in range(30)}
            for library in (f"lib{number}" for number in range(draw.randint(1, 6))):
                files = draw.sample(sorted(paths), draw.randint(0, 8))
                out = io.StringIO()
                quoting: Any = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
                writer = csv.writer(out, quoting=quoting, lineterminator=draw.choice(["\n", "\r\n"]))
                writer.writerows([[file, draw.choice(["", "sha256=a-_"]), ""] for file in files])
                self.install(library, record=out.getvalue() or "x,,")
                expected[library] = set(files)
            wanted = set(draw.sample(sorted(paths), draw.randint(1, 10)))
            with self.subTest(round=round_):
                found = {name for name, files_ in expected.items() if wanted & files_}
                self.assertEqual(self.owners(*wanted), found)


class TestWithoutRecord(Case):
    def test_names_decide(self) -> None:
        for name, top in [
            ("PyYAML", "_yaml\nyaml\n"), ("six", ""), ("typing-extensions", ""), ("tomli", ""),
            ("tomli-w", ""), ("rich", ""), ("azure-storage-blob", "azure"), ("azure-core", "azure"),
            ("azure-mgmt-core", "azure"), ("google-auth", ""), ("protobuf", "google\n"),
            ("googleapis-common-protos", "google\n"),
        ]:  # fmt: skip
            self.install(name, record=None, more={"top_level.txt": top} if top else {})
        old = {"old-1.0.egg-info": "Metadata-Version: 1.0\nName: old\n", "eggy.egg-info/PKG-INFO": "Name: eggy"}
        self.write(self.site, old)
        for module, expected in {
            "yaml/__init__.py": {"pyyaml"},
            "_yaml/__init__.py": {"pyyaml"},
            "six.py": {"six"},
            "old/__init__.py": {"old"},
            "eggy/__init__.py": {"eggy"},
            "typing_extensions.py": {"typing-extensions"},
            "tomli_w/__init__.py": {"tomli-w"},
            "rich_private.py": set(),
            "dropped.py": set(),
            "azure/storage/blob/__init__.py": {"azure-storage-blob"},
            "azure/core/x.py": {"azure-core"},
            "azure/other.py": {"azure-storage-blob", "azure-core", "azure-mgmt-core"},
            "google/auth/x.py": {"google-auth"},
            "google/protobuf/__init__.py": {"protobuf"},
        }.items():
            with self.subTest(module=module):
                self.assertEqual(self.owners(module), expected)

    def test_names_decide_only_of_what_no_record_lists_and_where_libraries_get_installed(self) -> None:
        self.install("azure-storage-blob", "azure/storage/blob.py")
        self.install("azure-other", record=None, more={"top_level.txt": "azure\n"})
        self.assertEqual(self.owners("azure/storage/blob.py"), {"azure-storage-blob"})
        both = {"azure-storage-blob", "azure-other"}
        self.assertEqual(self.owners("azure/storage/blob.py", "azure/x.py"), both)
        self.install("mine", "mine.py", record=None, folder=self.own)
        self.assertEqual(self.owners("mine.py", folder=self.own), set())

    def test_condas_own_lists_tell_and_are_read_only_where_they_could_matter(self) -> None:
        self.install("soup-four", "bs4like/__init__.py", record=None)
        self.install("alpha", "alpha.py")
        held = ["lib/site-packages/bs4like/__init__.py", "lib/site-packages/soup_four-1.0.dist-info/METADATA"]
        package = {"name": "soup", "files": held}
        self.write(self.folder, {"conda-meta/soup-1.json": json.dumps(package, indent=2)})
        self.write(self.folder, {"conda-meta/other-1.json": '{"files": ["lib/site-packages/other.py"]}'})
        before = f"sys.prefix = {str(self.folder)!r}"
        watch = "sys.addaudithook(lambda e, a: e == 'open' and 'conda' in str(a[0]) and print('read'))"
        self.assertEqual(self.used("import bs4like", before=before), {"soup-four"})
        self.assertEqual(self.used(f"import alpha; {watch}", before=before), {"alpha"})


class TestArchives(Case):
    def archive(self, path: Path, source: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for file in source.rglob("*"):
                archive.write(file, file.relative_to(source))

    def test_zipped_libraries_count_in_their_own_archive_and_rubbish_costs_itself(self) -> None:
        self.install("alpha", "alpha/__init__.py")
        self.install("beta", "beta.py", record="beta.py,x,notint,4,5\n")
        self.install("gamma", "gamma.py")
        (self.site / "delta-1.0.dist-info").mkdir()
        (self.site / "delta-1.0.dist-info" / "METADATA").write_bytes(b"Name: \xff\n")
        self.install("zeta", "other.py")
        self.write(self.site, {"zeta/__init__.py": ""})  # which its RECORD does not list
        self.archive(self.folder / "libs.zip", self.site)
        self.write(self.own / "app", {"gamma.py": ""})
        self.archive(self.folder / "app.zip", self.own / "app")
        zipped = os.pathsep.join([str(self.folder / "libs.zip"), str(HERE)])
        self.assertEqual(self.used("import alpha, beta, zeta", PYTHONPATH=zipped), {"alpha"})
        path = os.pathsep.join([str(self.folder / "app.zip"), zipped])
        self.assertEqual(self.used("import gamma, alpha", PYTHONPATH=path), {"alpha"})

    def test_eggs_count_zipped_or_not(self) -> None:
        info = {"PKG-INFO": "Metadata-Version: 1.0\nName: Gamma.X\n", "top_level.txt": "gamma\n"}
        self.write(self.folder / "egg", {"gamma/__init__.py": ""} | {f"EGG-INFO/{k}": v for k, v in info.items()})
        self.archive(self.folder / "gamma-1.0-py3.egg", self.folder / "egg")
        (self.folder / "egg").rename(self.folder / "gamma-2.0-py3.egg")
        for version in "12":
            path = f"{self.folder / f'gamma-{version}.0-py3.egg'}{os.pathsep}{HERE}"
            self.assertEqual(self.used("import gamma", PYTHONPATH=path), {"gamma-x"})

    FINDER = """
        import importlib.abc, importlib.machinery, importlib.metadata
        class Distribution(importlib.metadata.Distribution):
            def read_text(self, name):
                return {"METADATA": "Name: Vir.tual\\n", "top_level.txt": "virtual\\n"}.get(name)
            def locate_file(self, path): return path
        class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
            def find_spec(self, name, path=None, target=None):
                return importlib.machinery.ModuleSpec(name, self) if name in ("virtual", "mine") else None
            def exec_module(self, module): pass
            def find_distributions(self, context=None):
                return [Distribution()] if context is None or context.name != "popcon" else []
        sys.meta_path.insert(0, Finder())
        """

    def test_a_finder_of_ones_own_with_its_distributions_counts(self) -> None:
        self.install("clash", "virtual.py")
        finder = textwrap.dedent(self.FINDER)
        self.assertEqual(self.used(finder + "import virtual"), {"vir-tual"})
        self.assertEqual(self.used(finder + "import mine"), set())

    def test_a_backports_distributions_are_no_finders_own(self) -> None:
        self.install("clash", "virtual.py")
        backport = """
            class PathDistribution(importlib.metadata.PathDistribution.__mro__[1]):
                read_text, locate_file = Distribution.read_text, Distribution.locate_file
            Distribution = PathDistribution
            def all_of_them(): print("asked"); return {}
            importlib.metadata.packages_distributions = all_of_them
            """
        code = textwrap.dedent(self.FINDER) + textwrap.dedent(backport)
        self.assertEqual(self.used(code + "import virtual"), set())


# ---- libraries -> statsd lines -> datagrams -> socket ---------------------------------


class TestSending(Case):
    def setUp(self) -> None:
        super().setUp()
        self.install("alpha", "alpha.py")
        self.install("beta", "beta.py")

    def test_the_very_bytes(self) -> None:
        with Server() as server:
            self.run_python("import popcon; popcon.setup_reporter(); import beta, alpha", **server.settings)
            self.assertEqual(server.received(), [f"{PREFIX}alpha:1|c\n{PREFIX}beta:1|c".encode()])
        self.assertEqual(popcon.statsd_line("x", "p", "1.0"), b"p.x:1|c")
        self.assertEqual(popcon.statsd_line("x", "p", "0.10"), b"p.x:1|c|@0.10")

    def test_over_ipv6_and_by_name(self) -> None:
        code = "import popcon; popcon.setup_reporter(); import alpha"
        with Server() as server:
            self.run_python(code, **server.settings | {"PYTHON_POPCONTEST_STATSD_HOST": "localhost"})
            self.assertEqual(len(server.received()), 1)
        with contextlib.suppress(OSError), Server("::1") as server:  # where there is IPv6
            self.run_python(code, **server.settings)
            self.assertEqual(len(server.received()), 1)

    def test_datagrams_are_full_but_never_over_1232_bytes(self) -> None:
        lines = [popcon.statsd_line(f"library-{n}", "p" * (n % 50 + 1)) for n in range(500)]
        packed = popcon.datagrams(lines)
        self.assertEqual(b"\n".join(packed).split(b"\n"), lines)
        self.assertLessEqual(max(map(len, packed)), 1232)
        for datagram, following in zip(packed, packed[1:]):
            self.assertGreater(len(datagram) + 1 + len(following.partition(b"\n")[0]), 1232)
        longest = popcon.statsd_line(popcon.normalized("x" * 200), "p" * 1000, "0.12345678901234567")
        self.assertLessEqual(len(longest), 1232)
        for number in range(300):
            self.install(f"library-{number}", f"library_{number}.py")
        names = self.sent("for n in range(300): __import__(f'library_{n}')")[0]
        self.assertEqual(names, sorted(f"library-{number}" for number in range(300)))

    def test_each_library_once_per_process_whatever_is_set_up_again(self) -> None:
        code = """
            import alpha; print(popcon.report(), popcon.report())
            popcon.setup_reporter()
            import beta; popcon.setup_reporter(); print(popcon.report())
            import threading
            threading.Thread(target=popcon.setup_reporter).start(); print(sorted(popcon.used_libraries()))
            """
        printed = "['alpha'] []\n['beta']\n['alpha', 'beta']\n"
        self.assertEqual(self.sent(code), (["alpha", "beta"], printed, "", 0))

    def test_start_up_files_and_scripts_that_run_again_lose_nothing(self) -> None:
        self.write(self.site, {"popcon.pth": "import popcon; popcon.setup_reporter()\n"})
        self.write(self.own, {"app.py": "import popcon\npopcon.setup_reporter()\nimport alpha, beta\n"})
        path = f"import site; site.addsitedir({str(self.site)!r})"
        for code in (
            f"{path}; import alpha; site.main(); {path}; import beta",
            "import runpy; runpy.run_path('app.py'); runpy.run_path('app.py')",
        ):
            with self.subTest(code=code), Server() as server:
                self.run_python(code, **server.settings)
                self.assertEqual(server.names(), ["alpha", "beta"])

    def test_without_a_setup_all_that_is_loaded_counts_and_a_setup_afterwards_doubles_nothing(self) -> None:
        code = "import alpha, popcon; print(popcon.report()); popcon.setup_reporter(); import beta"
        with Server() as server:
            self.assertIn("alpha", self.run_python(code, **server.settings).stdout)
            names = server.names()
        self.assertEqual([names.count("alpha"), names.count("beta")], [1, 1])

    def test_the_sample_rate_draws_processes_and_is_told_to_the_server(self) -> None:
        code = """
            import popcon
            def sends():
                reporter = popcon.Reporter()
                reporter.update, reporter.used = lambda: None, {"alpha"}
                try: return bool(reporter.report())
                except ValueError: return False
            print(sum(sends() for _ in range(1000)))
            reporter = popcon.Reporter(); reporter.draw = 0.5
            try: reporter.report()
            except ValueError as error: print(error)
            """
        with Server() as server:
            rate = {"PYTHON_POPCONTEST_STATSD_SAMPLE_RATE": "0.5"}
            drawn, said = self.run_python(code, **server.settings | rate).stdout.splitlines()
            self.assertTrue(400 < int(drawn) < 600, drawn)
            self.assertEqual(said, "this process is not in the sample of 0.5")
            self.assertEqual(set(server.received()), {f"{PREFIX}alpha:1|c|@0.5".encode()})

    def test_nothing_is_sent_without_a_host_or_under_do_not_track_and_debug_says_why(self) -> None:
        for settings, reason in [
            ({"PYTHON_POPCONTEST_STATSD_HOST": ""}, "PYTHON_POPCONTEST_STATSD_HOST is not set"),
            ({"DO_NOT_TRACK": "1"}, "DO_NOT_TRACK is set"),
            ({"DO_NOT_TRACK": ""}, "DO_NOT_TRACK is set"),
            ({"PYTHON_POPCONTEST_STATSD_PREFIX": "a b"}, "PYTHON_POPCONTEST_STATSD_PREFIX='a b': must be"),
            ({"PYTHON_POPCONTEST_STATSD_HOST": "nowhere.invalid"}, ""),
        ]:
            with self.subTest(settings=settings):
                self.assertEqual(self.sent("import alpha", **settings), ([], "", "", 0))
                names, out, err, _ = self.sent("import alpha", PYTHON_POPCONTEST_DEBUG="1", **settings)
                self.assertEqual((names, out, len(err.splitlines())), ([], "", 1))
                self.assertIn(f"popcon: nothing sent: {reason}", err)
        names, _, err, _ = self.sent("import alpha", PYTHON_POPCONTEST_DEBUG="1", DO_NOT_TRACK="0")
        self.assertRegex(err, r"^popcon: sent python_popcon\.library_used\.alpha:1\|c to 127\.0\.0\.1:\d+\n$")
        self.assertEqual(names, ["alpha"])
        err = self.sent("", PYTHON_POPCONTEST_DEBUG="1")[2]
        self.assertEqual(err, "popcon: nothing sent: no library was used\n")

    def test_what_was_loaded_under_do_not_track_is_not_sent_later(self) -> None:
        self.install("gamma", "gamma.py")
        code = """
            import os, alpha
            popcon.report()
            os.environ["DO_NOT_TRACK"] = "1"
            import beta
            assert popcon.report() == []
            del os.environ["DO_NOT_TRACK"]
            import gamma
            """
        self.assertEqual(self.sent(code)[0], ["alpha", "gamma"])

    def test_a_wrong_setting_is_refused_with_what_is_right(self) -> None:
        for name, (right, wrong) in {
            "HOST": (
                ["", "a", "a.b.", "10.0.0.3", "::1", "fe80::1%eth0", "my_host-1"],
                ["a b", "http://x", "statsd:9125", "x\ny", "ü", "a..b", ".", ".a", "a" * 64 + ".b"],
            ),
            "PORT": (["", "1", "65535"], ["0", "65536", "-1", "1.5", "x", "١", "9" * 5000, " 1"]),
            "PREFIX": (
                ["", "a", "a.b_c-d"],
                ["a b", "a:b", "a|c", "a\nb", "é", "a..b", ".a", "a.", "a/b", "x" * 1001, "x" * 2000],
            ),
            "SAMPLE_RATE": (
                ["", "1", "1.0", "0.1", ".5"],
                ["0", "1.1", "-1", "x", "nan", "1e-3", "0,5", ".", "1.2.3", "0." + "1" * 30],
            ),
        }.items():
            setting = f"PYTHON_POPCONTEST_STATSD_{name}"
            for value in right + wrong:
                with self.subTest(name=name, value=value[:9]), mock.patch.dict(os.environ, {setting: value}):
                    if value in right:
                        self.assertEqual(popcon.setting(setting), value or popcon.SETTINGS[setting][0])
                    else:
                        with self.assertRaisesRegex(ValueError, f"(?s)^{setting}=.*: must be "):
                            popcon.setting(setting)

    def test_what_could_not_be_sent_is_sent_the_next_time_and_nothing_twice(self) -> None:
        for number in range(60):  # two datagrams
            self.install(f"library-{number}", f"library_{number}.py")
        code = """
            import _socket, sys
            for n in range(60): __import__(f"library_{n}")
            class Failing(_socket.socket):
                failure = OSError("gone")
                def sendto(self, packet, address):
                    if Failing.failure and Failing.sent: raise Failing.failure
                    Failing.sent += 1
                    return super().sendto(packet, address)
            Failing.sent = 0
            _socket.socket = Failing
            print(popcon.report())
            Failing.failure = SystemExit("the thread dies")
            import threading
            thread = threading.Thread(target=popcon.report); thread.start(); thread.join()
            Failing.failure = None
            """
        names, out, err, status = self.sent(code)
        self.assertEqual((out, err, status), ("[]\n", "", 0))
        self.assertEqual(names, sorted(f"library-{number}" for number in range(60)))

    def test_a_silent_name_server_delays_the_exit_by_a_second_at_most(self) -> None:
        with Server() as name_server:
            code = """
                import popcon, _socket, sys, time; popcon.setup_reporter(); import alpha
                resolve = _socket.getaddrinfo
                def silent(host, *arguments):
                    if host == b"statsd.example": time.sleep(30)
                    return resolve(host, *arguments)
                _socket.getaddrinfo = silent
                """
            code = textwrap.dedent(code) + name_server.silences() + "popcon.report(); popcon.report()"
            settings: dict[str, Any] = {"PYTHON_POPCONTEST_STATSD_HOST": "statsd.example"}
            settings["PYTHON_POPCONTEST_DEBUG"] = "1"
            start = time.monotonic()
            result = self.run_python(code, **settings)
            self.assertLess(time.monotonic() - start, 10)
            silent = "popcon: nothing sent: statsd.example: the name server is silent for 1 s"
            waits = "popcon: nothing sent: the name server was silent a while ago"
            self.assertEqual(result.stderr.splitlines(), [silent, waits, silent])  # at exit anew

    def test_the_name_server_is_asked_for_all_that_the_look_up_asks(self) -> None:
        files = {"/etc/resolv.conf": b"# x\nsearch a.b c\nnameserver 127.0.0.1\nnameserver ::1\n"}
        none, one = b"pc\x81\x80\0\1\0\0\0\0\0\0", b"pc\x81\x80\0\1\0\1\0\0\0\0"
        for answers, is_silent in [([], True), ([none], True), ([one], False), ([none] * 3, False)]:
            with (
                self.subTest(answers=answers),
                Server() as asked,
                mock.patch.multiple(
                    popcon, PATIENCE=0.1, NAME_SERVER_PORT=asked.port, read=lambda path: files.get(path, b"")
                ),
                ThreadPoolExecutor(1) as pool,
            ):
                future = pool.submit(popcon.await_name_server, "statsd.mon.")
                asked.socket.settimeout(5)
                queries = [asked.socket.recvfrom(512) for _ in range(3)]
                for answer in answers:
                    asked.socket.sendto(answer, queries[0][1])
                self.assertEqual(isinstance(future.exception(), TimeoutError), is_silent)
                labels = [b"", b"\1a\1b", b"\1c"]
                expected = [b"\6statsd\3mon" + label + b"\0\0\1\0\1" for label in labels]
                self.assertEqual([query[12:] for query, _ in queries], expected)
        with mock.patch.multiple(popcon, NAME_SERVER_PORT=asked.port, read=lambda path: files.get(path, b"")):
            popcon.await_name_server("statsd.mon")  # it is refused: nothing to wait for


# ---- the reporter -------------------------------------------------------------------


class TestSilence(Case):
    def test_setup_imports_nothing(self) -> None:
        code = """
            import sys, os  # which site, and so every interpreter but those run with -S, has loaded
            before = set(sys.modules)
            import popcon
            popcon.setup_reporter()
            print(*(set(sys.modules) - before - {"popcon", *sys.builtin_module_names}))
            """
        for flags in ([], ["-S"], ["-W", "error"]):
            self.assertEqual(self.run_python(code, *flags).stdout, "\n")

    WATCH = """
        import os, sys
        events = ("open", "os.listdir", "os.scandir", "import", "socket.__new__", "subprocess.Popen",
                  "os.fork", "socket.getaddrinfo", "os.mkdir", "os.remove", "os.rename", "os.exec",
                  "os.posix_spawn", "os.system", "socket.connect", "socket.sendto", "exec", "compile")
        def hook(event, arguments):
            if event in events:
                shown = [part for part in arguments if type(part) in (str, bytes, int, tuple)]
                os.write(2, f"{event} {shown}\\n".encode())
        sys.addaudithook(hook)
        """

    def test_a_process_that_used_no_library_reads_nothing_and_opens_no_socket(self) -> None:
        self.write(self.own, {"mine.py": ""})
        for code in ("import json, csv", "import sys; sys.path.insert(0, ''); import mine"):
            self.assertEqual(self.sent(code + textwrap.dedent(self.WATCH)), ([], "", "", 0))

    def test_what_is_read_and_opened_is_what_readme_says(self) -> None:
        for name in ("alpha", "beta"):
            self.install(name, f"{name}.py")
        self.install("bare", "bare.py", record=None)
        self.write(self.own, {"mine.py": "", "data.csv": ""})
        code = "import popcon, sys; sys.path.insert(0, ''); popcon.setup_reporter(); import alpha, mine, re, time\n"
        code += "import _socket, importlib.metadata\n" + textwrap.dedent(self.WATCH)
        for host, allowed in (("127.0.0.1", ""), ("localhost", "|/etc/(hosts|resolv.conf)")):
            with self.subTest(host=host), Server() as server:
                settings = server.settings | {"PYTHON_POPCONTEST_STATSD_HOST": host}
                ended = self.run_python(code, **settings)
                self.assertEqual(server.names(), ["alpha"])
                events = ended.stderr.splitlines()
                opened = [event for event in events if event.startswith("open ")]
                metadata = r"(RECORD|METADATA|PKG-INFO|direct_url\.json|top_level\.txt)"
                folder = re.escape(str(self.site))
                for event in opened:  # read only: flags without O_WRONLY, O_RDWR, O_CREAT
                    self.assertRegex(event, rf"^open \['({folder}/[\w.-]+-info/{metadata}{allowed})', \d+\]$")
                    self.assertEqual(int(event[:-1].split()[-1]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT), 0)
                others = [event.split()[0] for event in events if event not in opened]
                expected = ["socket.getaddrinfo", "socket.__new__", "socket.sendto"]
                self.assertEqual(others, expected)  # nothing listed, started, written

    def test_a_persons_own_modules_are_never_run_by_us(self) -> None:
        self.install("alpha", "alpha.py")
        self.install("quoted", record='"quoted.py",,\n')
        shadows = "csv email random socket bisect _bisect _socket json re enum selectors string operator"
        shadows += " sre_compile functools collections typing types copyreg _csv _json struct zipfile"
        source = "import os; os.write(1, b'executed'); import popcon; popcon.setup_reporter(); import alpha"
        self.write(self.own, {f"{name}.py": source for name in shadows.split()})
        code = f"import sys; sys.path.insert(0, {str(self.own)!r}); import alpha"
        self.assertEqual(self.sent(code), (["alpha"], "", "", 0))
        for script in ("csv.py", "random.py"):
            self.assertEqual(self.sent(script), (["alpha"], "executed", "", 0))
        # One that is loaded is not the standard library's, and not used, even if ours fail with it.
        failing = "def reader(*a): raise SystemExit('executed')\ncompile = escape = reader\n"
        for name in ("csv", "_csv", "re", "enum", "functools", "copyreg"):
            with self.subTest(name=name):
                self.write(self.own, {"fresh/" + name + ".py": failing})
                code = f"import sys; sys.path.insert(0, {str(self.own / 'fresh')!r}); import {name}, alpha"
                self.assertEqual(self.sent(code), (["alpha"], "", "", 0))
                shutil.rmtree(self.own / "fresh")

    def test_nothing_changes_the_process(self) -> None:
        self.install("alpha", "alpha.py")
        hook = "import signal, sys\nsys.addaudithook(lambda event, a: event == 'open' and {})"
        thread = """
            import sys, threading, types
            def change():
                number = 0
                while True:
                    number += 1
                    sys.modules[f"m{number % 999}"] = types.ModuleType("m")
                    sys.modules.pop(f"m{(number + 500) % 999}", None)
            threading.Thread(target=change, daemon=True).start()
            """
        everything, nothing, anything = ["alpha"], list[str](), None
        for what, code, flags, status, expected in [
            ("warnings are errors", "", ["-W", "error", "-bb", "-X", "dev"], 0, everything),
            ("optimised", "", ["-OO", "-s"], 0, everything),
            ("an exit status", "raise SystemExit(7)", [], 7, everything),
            ("no stderr", "import sys; sys.stderr = sys.stdout = None", [], 0, everything),
            ("closed streams", "import os; os.close(0); os.close(1); os.close(2)", [], 0, everything),
            ("no folder", "import os; os.mkdir('x'); os.chdir('x'); os.rmdir('../x')", [], 0, everything),
            ("no sys.path", "import sys; del sys.path[:]", [], 0, everything),
            ("no sys.modules", "import sys; sys.modules.clear()", [], 0, nothing),
            ("no meta_path", "import sys; del sys.meta_path[:]", [], 0, anything),
            ("no environment", "import os; os.environ.clear()", [], 0, nothing),
            ("no descriptors", "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (3, 3))", [], 0, nothing),
            ("no threads", "import _thread; _thread.start_new_thread = None", [], 0, everything),
            ("gone", "import sys; sys.modules['random'] = sys.modules['re'] = None", [], 0, anything),
            ("a thread that imports", textwrap.dedent(thread), [], 0, everything),
            ("Ctrl-C", hook.format("signal.raise_signal(signal.SIGINT)"), [], 0, anything),
            ("an excepthook", "import sys; sys.excepthook = sys.unraisablehook = 5", [], 0, everything),
            ("a strange stream", "import sys; sys.stderr = 5", [], 120, everything),
            ("another folder", "import os; os.chdir('/')", [], 0, everything),
            ("no clock", "import time; del time.monotonic", [], 0, nothing),
            ("no sockets", hook.replace("event == 'open'", "event[:6] == 'socket'").format("1 / 0"), [], 0, nothing),
        ]:
            with self.subTest(what=what):
                names, out, err, ended = self.sent("import alpha\n" + code, *flags)
                without = self.run_python("import alpha\n" + code, *flags)
                self.assertEqual((ended, out, err), (without.returncode, "", without.stderr))
                self.assertEqual(ended, status)
                if expected is not None:
                    self.assertEqual(names, expected)

    def test_isolated_and_without_site(self) -> None:
        self.install("alpha", "alpha.py")
        code = f"import sys; sys.path[:0] = {[str(self.site), str(HERE)]!r}; import popcon; popcon.setup_reporter(); import alpha"
        for flags in (["-I"], ["-S"], ["-E"], ["-I", "-S", "-W", "error", "-X", "dev", "-bb"]):
            with self.subTest(flags=flags), Server() as server:
                # -I and -E keep Python from its own variables, not ours from us.
                result = self.run_python(code, *flags, **server.settings)
                self.assertEqual((result.returncode, result.stdout, result.stderr), (0, "", ""))
                self.assertEqual(server.names(), ["alpha"])

    def test_a_traceback_stays_as_it_is(self) -> None:
        self.install("alpha", "alpha.py")
        names, _, err, status = self.sent("import alpha\nraise ValueError('mine')")
        without = self.run_python("\nimport alpha\nraise ValueError('mine')")
        self.assertEqual((names, status, err), (["alpha"], without.returncode, without.stderr))

    def test_no_debugger_and_no_profiler_sees_popcon_at_exit_and_both_go_on_afterwards(self) -> None:
        self.install("alpha", "alpha.py")
        code = """
            import atexit, sys
            atexit.register(lambda: print("before", sys.gettrace() is trace, sys.getprofile() is trace))
            import popcon; popcon.setup_reporter(); import alpha
            seen = set()
            def trace(frame, event, argument):
                seen.add(frame.f_code.co_filename)
                return trace
            atexit.register(lambda: None)
            def tell():
                sys.settrace(None); sys.setprofile(None)
                print(any(name.endswith("popcon.py") for name in seen), len(seen) > 0)
            """
        tell = "\nsys.settrace(trace); sys.setprofile(trace)"
        first = "import atexit\natexit.register(lambda: tell())\n"  # which runs last
        with Server() as server:
            ended = self.run_python(first + textwrap.dedent(code) + tell, **server.settings)
            self.assertEqual(server.names(), ["alpha"])
        self.assertEqual((ended.stdout, ended.stderr), ("before True True\nFalse True\n", ""))

    def test_the_exit_takes_less_than_four_megabytes(self) -> None:
        for number in range(400):
            lines = (f"library_{number}/module_{n}.py,sha256={'x' * 43},123\n" for n in range(200))
            self.install(f"library-{number}", record="".join(lines))
        self.install("alpha", "alpha.py")
        code = """
            import popcon, tracemalloc; popcon.setup_reporter(); import alpha
            import re, csv, json  # the process's own
            tracemalloc.start(); popcon.report(); print(tracemalloc.get_traced_memory()[1])
            """
        settings: dict[str, Any] = {"PYTHON_POPCONTEST_STATSD_HOST": "127.0.0.1"}
        settings["PYTHON_POPCONTEST_STATSD_PORT"] = "9"
        self.assertLess(int(self.run_python(code, **settings).stdout), 4_000_000)

    def test_an_older_python_says_what_is_needed_in_one_sentence(self) -> None:
        source = SOURCE.read_text(encoding="utf-8").replace("0x030A0000", "0x7F000000")
        self.write(self.own, {"popcon.py": source})
        ended = subprocess.run([sys.executable, self.own / "popcon.py", "selftest"], capture_output=True, text=True)
        self.assertEqual((ended.returncode, ended.stdout, len(ended.stderr.splitlines())), (1, "", 1))
        self.assertIn("popcon needs Python 3.10", ended.stderr)


@unittest.skipUnless(hasattr(os, "fork"), "needs os.fork")
class TestForks(Case):
    def setUp(self) -> None:
        super().setUp()
        for name in ("alpha", "beta", "gamma"):
            self.install(name, f"{name}.py")

    def counts(self, code: str, python: str = sys.executable, **settings: str) -> dict[str, int]:
        """How often each library was sent by a program and all that it starts."""
        self.write(self.own, {"program.py": textwrap.dedent(code)})
        with Server() as server:
            flags = ["-W", "error::DeprecationWarning:__main__"]
            result = self.run_python("program.py", *flags, python=python, **server.settings | settings)
            self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)
            names = server.names(0.2)
        return {name: names.count(name) for name in names if name in ("alpha", "beta", "gamma")}

    def test_a_child_counts_what_it_loaded_itself(self) -> None:
        code = """
            import popcon; popcon.setup_reporter()
            import alpha, os, sys
            children = [os.fork() or sys.exit({}) for _ in range(3)]
            for child in children:
                os.waitpid(child, 0)
            """
        for work, more in [
            ("0", {}),
            ("__import__('beta') and 0", {"beta": 3}),
            ("sys.modules.pop('alpha') and __import__('beta') and 0", {"beta": 3}),
            ("__import__('alpha') and popcon.setup_reporter()", {}),
        ]:
            with self.subTest(work=work):
                self.assertEqual(self.counts(code.format(work)), {"alpha": 1} | more)

    def test_a_child_that_loads_nothing_looks_at_no_module_and_asks_for_nothing(self) -> None:
        code = """
            import popcon; popcon.setup_reporter()
            import alpha, os, sys
            if not os.fork():
                popcon.executed_files = popcon.setting = lambda *ignored: os.write(2, b"looked")
                {}
                sys.exit(0)
            os.wait()
            """
        for more in ("pass", "os.environ['DO_NOT_TRACK'] = '1'", "del os.environ['PYTHON_POPCONTEST_STATSD_HOST']"):
            self.assertEqual(self.counts(code.format(more)), {"alpha": 1})

    def test_no_fork_warning_is_caused(self) -> None:
        with Server() as name_server:
            code = """
                import popcon, os, sys, warnings; popcon.setup_reporter()
                warnings.simplefilter("error")
                import alpha
                for host in ("localhost", "statsd.example"):
                    os.environ["PYTHON_POPCONTEST_STATSD_HOST"] = host
                    popcon.report()
                    child = os.fork() or sys.exit(0)
                    assert os.waitpid(child, 0)[1] == 0
                """
            self.counts(name_server.silences() + textwrap.dedent(code))

    WORKER = """
        import sys
        import popcon; popcon.setup_reporter()
        import alpha

        def work(number):
            import beta
            {work}

        if __name__ == "__main__":
            import {module} as multiprocessing, concurrent.futures
            context = multiprocessing.get_context("{method}")
            {run}
        """
    PROCESSES = "workers = [context.Process(target=work, args=(n,)) for n in range(3)]; "
    PROCESSES += "[worker.start() for worker in workers]; [worker.join() for worker in workers]"
    POOL = "pool = context.Pool(1); pool.map(work, range(3)); pool.close(); pool.join()"
    EXECUTOR = "pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context); "
    EXECUTOR += "list(pool.map(work, range(3))); pool.shutdown()"

    def test_workers_of_multiprocessing_report_what_they_imported_themselves(self) -> None:
        terminated = "pool = context.Pool(1); pool.map(work, range(3)); pool.terminate()"
        for method, run, work, expected in [
            ("fork", self.PROCESSES, "", {"alpha": 1, "beta": 3}),
            ("fork", self.POOL, "", {"alpha": 1, "beta": 1}),
            ("fork", self.EXECUTOR, "", {"alpha": 1, "beta": 1}),
            ("fork", terminated, "popcon.report()", {"alpha": 1, "beta": 1}),
            # These import the program anew, the set-up in it too: each worker loads alpha by itself.
            ("spawn", self.PROCESSES, "", {"alpha": 4, "beta": 3}),
            # From 3.14 on, the server of forks does so, once for all.
            ("forkserver", self.PROCESSES, "", {"alpha": 4 if sys.version_info < (3, 14) else 2, "beta": 3}),
        ]:
            with self.subTest(method=method, run=run):
                code = self.WORKER.format(module="multiprocessing", method=method, run=run, work=work)
                self.assertEqual(self.counts(code), expected)

    @unittest.skipUnless(RELATIVES, "needs POPCON_TEST_RELATIVES, a python with multiprocess, billiard, gunicorn")
    def test_workers_of_multiprocess_billiard_and_loky_report_too(self) -> None:
        for module in ("multiprocess", "billiard"):
            code = self.WORKER.format(module=module, method="fork", run=self.POOL, work="")
            self.assertEqual(self.counts(code, RELATIVES), {"alpha": 1, "beta": 1}, module)
        code = """
            import popcon; popcon.setup_reporter()
            from joblib import Parallel, delayed
            from joblib.externals.loky import get_reusable_executor

            def work(number):
                {}
                import beta

            if __name__ == "__main__":
                Parallel(n_jobs=2)(delayed(work)(n) for n in range(4))
                get_reusable_executor().shutdown()
            """
        self.assertEqual(self.counts(code.format("pass"), RELATIVES), {})
        counted = self.counts(code.format("import popcon; popcon.setup_reporter()"), RELATIVES)
        self.assertIn(counted["beta"], (1, 2))

    @unittest.skipUnless(RELATIVES, "needs POPCON_TEST_RELATIVES, a python with multiprocess, billiard, gunicorn")
    def test_workers_of_gunicorn_with_a_preloaded_app_count_what_they_load_themselves(self) -> None:
        app = """
            import popcon; popcon.setup_reporter()
            import alpha

            def app(environ, start_response):
                import beta
                start_response("200 OK", [])
                return [b"hello"]
            """
        self.write(self.own, {"application.py": textwrap.dedent(app)})
        with socket.create_server(("127.0.0.1", 0)) as tcp:
            url = f"127.0.0.1:{tcp.getsockname()[1]}"
        with Server() as server:
            process = subprocess.Popen(
                [RELATIVES, "-m", "gunicorn", "--preload", "--workers=2", f"--bind={url}", "application:app"],
                env=clean_environ(**server.settings, PYTHONPATH=os.pathsep.join([str(self.site), str(HERE)])),
                cwd=self.own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                for _ in range(100):
                    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{url}/", timeout=5):
                        break
                    time.sleep(0.1)
            finally:
                process.terminate()
                process.wait(30)
            names = server.names(0.5)
        self.assertEqual((names.count("alpha"), names.count("beta")), (1, 1))  # one had the request


# Drives a real kernel: cells come as JSON on stdin; what each printed goes out.
KERNEL = """
import json, sys
from jupyter_client.manager import start_new_kernel

def execute(cell):
    # Now and then a kernel on 3.10 does not hear a request, with or without popcon: ask again.
    # What was heard is not asked again: a hook that hangs does so after the cell has begun.
    for _ in range(2):
        heard = []
        try:
            client.execute_interactive(cell, timeout=30, output_hook=heard.append)
        except TimeoutError:
            if heard:
                sys.exit(f"no end of {cell!r}: {heard}")
        else:
            said = [message["content"] for message in heard]
            return "".join([one.get("text") or "".join(one.get("traceback", ())) for one in said])
    sys.exit(f"nothing was heard of {cell!r}")

job = json.load(sys.stdin)
manager, client = start_new_kernel(kernel_name="python3", startup_timeout=60)
manager.shutdown_wait_time = 60
out = [execute(cell) for cell in job["cells"]]
if job["end"] == "restart":
    manager.restart_kernel(now=True)
    client.wait_for_ready(timeout=60)
manager.shutdown_kernel(now=job["end"] == "kill")
print(json.dumps(out))
"""


@unittest.skipUnless(JUPYTER, "needs POPCON_TEST_JUPYTER, a python with ipykernel, bs4, sympy")
class TestShells(Case):
    def setUp(self) -> None:
        super().setUp()
        self.startup = self.own / "profile_default" / "startup"
        self.write(self.startup, {"000-popcon.py": readme_start_up()})
        self.install("alpha", "alpha.py")
        self.server = self.open(Server())

    def run_there(self, code: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run the code where IPython is, and reports to the server."""
        folders = dict.fromkeys(["HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"], str(self.own))
        settings = self.server.settings | folders | settings
        return self.run_python(code, "-W", "ignore", python=JUPYTER, **settings)

    def kernel(self, *cells: str, end: str = "shutdown", **settings: str) -> list[str]:
        """What each cell of a real kernel printed."""
        job = json.dumps({"cells": cells, "end": end})
        code = f"import io, sys; sys.stdin = io.StringIO({job!r})\n{KERNEL}"
        for _ in range(2):  # now and then one on 3.10 hears nothing any more, even without popcon
            ended = self.run_there(code, **settings)
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
        again += "print(hooks.count(popcon._report_after_cell))"
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
            popcon.shells_own([str(self.site)])

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
        for _ in range(300):
            if "last" in counts():
                break
            time.sleep(0.1)
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
        command, null = ["node", "-r", "./buffer.js", STATSD, "config.js"], subprocess.DEVNULL
        node = self.open(subprocess.Popen(command, cwd=self.folder, stdout=null, stderr=null))
        self.addCleanup(node.kill)

        def counters() -> dict[str, int]:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as management:
                management.sendall(b"counters\n")
                answer = "".join(iter(management.makefile().readline, "END\n"))
            return {name: int(n) for name, n in re.findall(r"'?([\w.-]+)'?: (\d+)", answer)}

        for _ in range(300):
            with contextlib.suppress(OSError):
                counters()
                break
            time.sleep(0.1)
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

ALPHA = "python_popcon.library_used.alpha:1|c"
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
        for name in ("DEBUG", "PROMETHEUS_HEADER", "RATE"):
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
            not counted: sleepy: not executed, or without a file
            not counted: N modules of the standard library
            python_popcon.library_used.beta-x:1|c
            """))  # fmt: skip


class TestInstall(Lone):
    template: tempfile.TemporaryDirectory[str]

    @classmethod
    def setUpClass(cls) -> None:
        cls.template = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.template.cleanup)
        venv.create(cls.template.name, symlinks=os.name != "nt")

    def setUp(self) -> None:
        super().setUp()
        self.prefix = self.folder / "env"
        shutil.copytree(self.template.name, self.prefix, symlinks=True)
        (self.purelib,) = self.prefix.glob("lib/python*/site-packages")
        self.library = self.purelib / "popcon.py"
        self.pth = self.purelib / "popcon.pth"
        self.startup = self.prefix / "etc" / "ipython" / "startup" / "000-popcon.py"
        self.install("alpha", "alpha.py", folder=self.purelib)
        self.before = self.state()

    def run_in_it(
        self, *arguments: str, cwd: Path | None = None, text: str = "", **settings: str
    ) -> tuple[int, str, str]:
        """Run the environment's Python, which finds nothing but what is in it."""
        environ = clean_environ(**settings)
        for name in {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"} - settings.keys():
            del environ[name]
        # Permissions are to hold for root too.
        is_root = os.name != "nt" and os.geteuid() == 0
        humbly = ["setpriv", "--bounding-set=-dac_override"] if is_root else []
        command = [*humbly, str(self.prefix / "bin" / "python"), *arguments]
        run = dict[str, Any](input=text, capture_output=True, text=True, timeout=120)
        result = subprocess.run(command, env=environ, cwd=cwd or self.lone, **run)
        return result.returncode, result.stdout, result.stderr

    def command(self, command: str, cwd: Path | None = None) -> str:
        """Run a command that ends well, of the environment's popcon or of the lone one."""
        script = ["-m", "popcon"] if cwd else ["popcon.py"]
        status, out, err = self.run_in_it(*script, *command.split(), cwd=cwd)
        self.assertEqual((status, err), (0, ""), out)
        return out

    def state(self) -> dict[str, bytes | None]:
        paths = sorted(self.prefix.rglob("*"))
        return {str(path): path.read_bytes() if path.is_file() else None for path in paths}

    def reported(self, *arguments: str, **settings: str) -> list[str]:
        """What the environment's Python sends; it says nothing."""
        with Server() as server:
            settings = server.settings | settings
            ended = self.run_in_it("-B", "-W", "error", *arguments, cwd=self.own, **settings)
            self.assertEqual(ended, (0, "", ""))
            return server.names()

    def session(self) -> list[str]:
        """Arguments for what IPython does with the start-up file, and in a cell."""
        return ["-c", f"import runpy; runpy.run_path({str(self.startup)!r}); import alpha"]

    def test_an_uninstall_leaves_the_environment_as_it_was(self) -> None:
        for others in ({}, {"__pycache__/other.cpython-399.pyc": "", "popcon_x.py": ""}):
            self.write(self.purelib, others)
            self.write(self.startup.parent, {"500-mine.py": ""} if others else {})
            before = self.state()
            for arguments in ("install", "install --all-processes"):
                out = self.command(arguments)
                after = self.state()
                files = {path for path in after.keys() - before.keys() if after[path] is not None}
                self.assertEqual({f"wrote {path}" for path in files}, {*out.splitlines()[:-1]})
                self.assertEqual(self.pth.exists(), "--all" in arguments)
                for words in ("nothing is sent until PYTHON_POPCONTEST_STATSD_HOST", "selftest"):
                    self.assertIn(words, out.splitlines()[-1])
                self.assertNotIn("wrote", self.command(arguments))
                self.assertEqual(self.state(), after)
                out = self.command("uninstall", cwd=self.own)
                self.assertEqual({f"removed {path}" for path in files}, {*out.splitlines()})
                self.assertEqual(self.state(), before)
            self.command("install")
            self.run_in_it("-OO", "-c", "import popcon", cwd=self.own)
            self.write(self.purelib, {"__pycache__/popcon.cpython-399.pyc": ""})
            self.command("uninstall")
            self.assertEqual(self.state(), before)
        self.assertIn("nothing to do", self.command("uninstall"))

    def test_files_appear_whole_or_not_at_all_and_a_cut_short_install_is_completed(self) -> None:
        """It dies before each of its changes; so does an uninstall."""
        code = textwrap.dedent("""\
            import os, sys, popcon
            changes = ["os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir"]
            left = [None] * int(sys.argv[1])
            def die(event, arguments):
                is_made = event == "open" and arguments[2] & os.O_CREAT
                if is_made and str(arguments[0]).endswith((".py", ".pth")):
                    os._exit(8)
                if is_made or event in changes:
                    left.pop() if left else os._exit(9)
            sys.addaudithook(die)
            popcon.main(sys.argv[2:])
            """)
        self.command("install --all-processes")
        whole = {path: path.read_bytes() for path in (self.library, self.startup, self.pth)}
        for command in ("install --all-processes", "uninstall"):
            for at in range(99):
                if command == "uninstall":
                    self.command("install --all-processes")
                    self.assertTrue(all(path.exists() for path in whole))
                else:
                    self.command("uninstall")
                    self.assertEqual(self.state(), self.before, at)
                ended = self.run_in_it("-c", code, str(at), *command.split())[0]
                self.assertIn(ended, (0, 9))
                found = {path: path.read_bytes() for path in whole if path.exists()}
                self.assertLessEqual(found.items(), whole.items())
                if not ended:
                    break
            self.assertGreater(at, 6)

    def test_installs_at_the_same_moment_do_no_harm(self) -> None:
        with ThreadPoolExecutor(4) as pool:
            ended = [*pool.map(self.command, ["install --all-processes"] * 4)]
        self.assertEqual(len(ended), 4)
        self.assertEqual(self.library.read_bytes(), SOURCE.read_bytes())
        self.assertTrue(self.pth.exists() and self.startup.exists())
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
            with self.subTest(path=path, text=text):
                self.write(path.parent, {path.name: text})
                before = self.state()
                why = f"popcon: {path} is in the way: it is not popcon's; nothing was changed\n"
                ended = self.run_in_it("popcon.py", "install", "--all-processes")
                self.assertEqual((*ended, self.state()), (1, "", why, before))
                self.command("uninstall")
                self.assertEqual(self.state(), before)
                path.unlink()
                shutil.rmtree(self.prefix / "etc", ignore_errors=True)
                shutil.rmtree(self.purelib / "popcon", ignore_errors=True)

    def test_another_version_is_upgraded_where_install_wrote_it(self) -> None:
        self.command("install --all-processes")
        for path in (self.library, self.pth, self.startup):
            path.write_text(path.read_text(encoding="utf-8") + "# older\n", encoding="utf-8")
        self.assertEqual(self.command("install --all-processes").count("wrote"), 4)
        self.assertEqual(self.library.read_bytes(), SOURCE.read_bytes())

    def test_each_process_reports_once_and_a_persons_own_popcon_is_left_alone(self) -> None:
        self.command("install")
        self.assertEqual(self.reported(*self.session()), ["alpha"])
        self.assertEqual(self.reported("-c", "import alpha"), [])
        mine = {"popcon.py": "raise SystemExit('run')"}
        self.write(self.folder / "elsewhere", mine)
        elsewhere = str(self.folder / "elsewhere")
        self.assertEqual(self.reported(*self.session(), PYTHONPATH=elsewhere), [])
        self.write(self.own, mine)
        self.assertEqual(self.reported(*self.session()), [])
        self.command("install --all-processes")
        self.assertEqual(self.reported("-c", "import alpha"), ["alpha"])
        self.assertEqual(self.reported(*self.session()), ["alpha"])

    def test_activation_is_silent_whatever_popcon_is_and_leaves_no_name(self) -> None:
        self.command("install --all-processes")
        code = f"import runpy; print({{*runpy.run_path({str(self.startup)!r})}} - "
        code += f"{{*runpy.run_path({os.devnull!r})}})"
        for source in (SOURCE.read_text("utf-8"), None, "half a file (", "raise RuntimeError", ""):
            self.library.unlink() if source is None else self.library.write_text(source, "utf-8")
            for flags in ([], ["-S"]):
                ended = self.run_in_it("-W", "error", *flags, "-c", code, cwd=self.own)
                self.assertEqual(ended, (0, "set()\n", ""))

    @unittest.skipUnless(OLD_PYTHONS, "needs POPCON_TEST_OLD_PYTHONS")
    def test_older_pythons_are_told_in_a_sentence_and_by_start_up_files_nothing(self) -> None:
        self.command("install --all-processes")
        run = dict[str, Any](capture_output=True, text=True)
        run["env"] = clean_environ(PYTHONPATH=str(self.lone))
        for python in OLD_PYTHONS:
            for text in (readme_start_up(), self.startup.read_text(), self.pth.read_text()):
                self.write(self.lone, {"sitecustomize.py": text})
                ended = subprocess.run([python, "-c", "print(1)"], **run)
                self.assertEqual((ended.stdout, ended.stderr), ("1\n", ""))
            ended = subprocess.run([python, str(SOURCE)], **run)
            if "/2.7" not in python:
                self.assertRegex(ended.stderr, r"\Apopcon needs Python 3.10 .*\n\Z")

    def test_sitecustomize_with_the_lines_by_hand_reports(self) -> None:
        self.write(self.lone, {"sitecustomize.py": readme_start_up()})
        self.assertEqual(self.reported("-c", "import alpha", PYTHONPATH=str(self.lone)), ["alpha"])
        (self.lone / "popcon.py").unlink()
        self.assertEqual(self.reported("-c", "import alpha", PYTHONPATH=str(self.lone)), [])

    @unittest.skipUnless(hasattr(os, "geteuid"), "needs permissions")
    def test_permissions(self) -> None:
        """Who uses the environment can read what was written; who may not write is told so."""

        def refused(command: str) -> None:
            places = [path for path in (self.prefix, *self.prefix.rglob("*")) if path.is_dir()]
            for place in places:
                place.chmod(0o555)
            before = self.state()
            status, out, err = self.run_in_it("popcon.py", command)
            self.assertEqual((status, out.count("wrote"), self.state()), (1, 0, before))
            self.assertRegex(err, r"\Apopcon: .*Permission denied: .*\n\Z")
            for place in places:
                place.chmod(0o755)

        refused("install")
        self.addCleanup(os.umask, os.umask(0o077))
        self.command("install --all-processes")
        made = self.state().keys() - self.before.keys()
        self.assertEqual(len(made), 8)
        for path in made:
            mode = stat.S_IMODE(os.stat(path).st_mode)
            self.assertEqual(oct(mode), oct(0o755 if os.path.isdir(path) else 0o644), path)
        refused("uninstall")
        self.command("uninstall")
        (self.prefix / "etc").write_text("a file where a folder belongs")
        status, out, err = self.run_in_it("popcon.py", "install")
        self.assertEqual((status, err.count("\n"), "Traceback" in err), (1, 1, False))

    def test_paths_that_the_encoding_does_not_hold(self) -> None:
        self.prefix = self.prefix.rename(self.folder / "\u00f6")
        for command in ("install", "selftest", "uninstall"):
            status, out, err = self.run_in_it("popcon.py", command, PYTHONIOENCODING="ascii")
            self.assertEqual((status, err, "\\xf6/" in out), (0, "", True), out)

    def test_selftest_sees_what_is_on_and_what_is_left_over(self) -> None:
        self.assertRegex(self.command("selftest"), "(?m)^warning +import .*popcon.py is not there")
        shutil.copy(SOURCE, self.purelib)
        self.purelib.chmod(0o555)
        self.addCleanup(self.purelib.chmod, 0o755)
        self.assertRegex(self.command("selftest"), "(?m)^warning +bytecode +can't be")
        self.purelib.chmod(0o755)
        self.assertRegex(self.command("selftest"), r"(?m)^ok +bytecode .*popcon\.py$")
        self.assertTrue([*self.purelib.glob("__pycache__/popcon.*.pyc")])
        self.command("install --all-processes")
        out = self.command("selftest")
        self.assertRegex(out, "(?m)^ok +processes +every one reports$")
        self.assertNotIn("left over", out)
        self.library.unlink()
        others = {"050.py": "import popularity_contest.reporter", "060.py": "import mine"}
        self.write(self.startup.parent, others)
        out = self.command("selftest")
        self.assertEqual(len(re.findall("(?m)^warning +left over", out)), 3, out)
        self.assertRegex(out, "(?m)^ok +processes +not each reports")

    def test_from_python_3_18_on_a_start_file_activates(self) -> None:
        with mock.patch.object(sys, "version_info", (3, 18)):
            _, switches = popcon.places()
        self.assertEqual([Path(path).name for path in switches], ["000-popcon.py", "popcon.start"])
        if sys.version_info >= (3, 15):
            code = "import sys, sysconfig, popcon; sysconfig.get_paths();"
            code += "sys.version_info = (3, 18); popcon.main(['install', '--all-processes'])"
            self.assertEqual(self.run_in_it("-c", code)[::2], (0, ""))
            self.assertFalse(self.pth.exists())
            self.assertEqual(self.reported("-c", "import alpha"), ["alpha"])

    def test_what_pip_installed_is_used_and_left(self) -> None:
        info = self.install("popcon", folder=self.purelib, record="popcon.py,,\n")
        shutil.copy(SOURCE, self.purelib)
        installed = self.state()
        self.command("install --all-processes", cwd=self.own)
        self.assertEqual(self.reported("-c", "import alpha"), ["alpha"])
        out = self.command("uninstall", cwd=self.own)
        self.assertIn(f"left {self.library}: it was installed by pip", out)
        shutil.rmtree(self.purelib / "__pycache__")  # of -m popcon
        self.assertEqual(self.state(), installed)
        (self.lone / "popcon.py").write_text(SOURCE.read_text("utf-8") + "# newer\n", "utf-8")
        status, out, err = self.run_in_it("popcon.py", "install")
        self.assertEqual((status, out, self.state()), (1, "", installed))
        self.assertRegex(err, "in the way: it was installed by pip")
        self.command("install --all-processes", cwd=self.own)
        self.library.unlink()
        shutil.rmtree(info)  # as pip does
        self.assertEqual(self.reported("-c", "import alpha"), [])
        self.command("uninstall")
        self.assertEqual([*self.prefix.rglob("*popcon*")], [])

    def test_the_working_folder_and_pythonpath_do_not_mislead_install(self) -> None:
        for path in (f"/nowhere{os.pathsep}", str(self.lone)):
            ended = self.run_in_it("popcon.py", "install", PYTHONPATH=path)
            self.assertEqual((*ended[::2], self.library.exists()), (0, "", True))
            self.command("uninstall")

    def test_site_packages_with_two_names_as_on_fedora_are_one(self) -> None:
        link = self.folder / "lib64"
        link.symlink_to(self.purelib)
        code = f"import site, popcon; site.getsitepackages = lambda: [{str(link)!r}]; popcon.main"
        for command in (["install", "--all-processes"], ["install"], ["uninstall"]):
            self.assertEqual(self.run_in_it("-c", f"{code}({command})")[::2], (0, ""))
        self.assertEqual(self.state(), self.before)

    def test_popcon_of_another_folder_is_used_and_left(self) -> None:
        other = self.site / "popcon.py"
        shutil.copy(SOURCE, other)
        code = f"import site, popcon; site.getsitepackages = lambda: [{str(self.site)!r}];"
        code += "import sys; sys.exit(popcon.main(sys.argv[1:]))"
        self.assertEqual(self.run_in_it("-c", code, "install")[::2], (0, ""))
        self.assertEqual((self.library.exists(), self.startup.exists()), (False, True))
        self.assertEqual(self.run_in_it("-c", code, "uninstall")[::2], (0, ""))
        self.assertEqual((other.exists(), self.state()), (True, self.before))
        other.write_text(SOURCE.read_text("utf-8") + "# older\n", "utf-8")
        status, _, err = self.run_in_it("-c", code, "install")
        self.assertEqual((status, self.state()), (1, self.before))
        self.assertIn("it is where install does not write; nothing was changed\n", err)

    @unittest.skipUnless(JUPYTER, "needs POPCON_TEST_JUPYTER, a python with IPython")
    def test_kernels_where_all_processes_report_count_no_shell_and_selftest_sees_it(self) -> None:
        place = "import ipykernel; print(ipykernel.__path__[0])"
        site = os.path.dirname(subprocess.check_output([JUPYTER, "-c", place], text=True).strip())
        (self.purelib / "jupyter.pth").write_text(site)
        self.write(self.own, {"popcon.py": "raise SystemExit('run')"})
        self.assertRegex(self.command("selftest"), "(?m)^warning +IPython +sessions do not report")
        self.command("install")
        out = self.command("selftest")
        self.assertRegex(out, "(?m)^ok +IPython +every session reports$")
        self.assertRegex(out, "(?m)^ok +processes +not each reports")
        self.command("install --all-processes")
        own: Any = dict.fromkeys(["HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"], str(self.own))
        job = {"cells": ["1/0", "import alpha; print(dir())"], "end": "kill"}
        with Server() as server:
            own |= server.settings | {"cwd": self.own, "text": json.dumps(job)}
            status, out, err = self.run_in_it("-W", "ignore", "-c", KERNEL, **own)
            self.assertEqual((status, "popcon" in out), (0, False), out + err)
            datagrams = server.received(0.5)
        # The first is the kernel's; its driver is a process, and reports what it used itself.
        self.assertEqual(datagrams[0], ALPHA.encode())
        self.assertIn(b"jupyter-client", b"".join(datagrams[1:]))


# ---- usage --------------------------------------------------------------------------

VICTORIAMETRICS = os.environ.get("POPCON_TEST_VICTORIAMETRICS", "")


class UsageCase(Case):
    @contextlib.contextmanager
    def server(self, path: str, *targets: int) -> Iterator[str]:
        """The real server, which scrapes these ports each second: its address."""
        folder, address = self.folder / f"server-{free_port()}", f"127.0.0.1:{free_port()}"
        jobs = [{"targets": [f"127.0.0.1:{port}" for port in targets]}]
        config = {"global": {"scrape_interval": "1s"},
                  "scrape_configs": [{"job_name": "popcon", "static_configs": jobs}]}
        self.write(folder, {"config.yml": json.dumps(config)})  # which is YAML, too
        options = ["--config.file=", "--storage.tsdb.path=", "--web.listen-address="]
        if path == VICTORIAMETRICS:
            options = ["-promscrape.config=", "-storageDataPath=", "-httpListenAddr="]
        values = (str(folder / "config.yml"), str(folder / "data"), address)
        command = [path, *map("".join, zip(options, values))]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield f"http://{address}"
        finally:
            process.kill()
            process.wait()

    def wait_for_scrapes(self, *urls: str) -> None:
        """Wait until the servers tell of both exporters what they showed a second ago."""
        begin = time.time()
        query = f"count(timestamp(up) > {begin + 1} and up == 1) == 2"
        form = urllib.parse.urlencode({"query": query, "latency_offset": "1ms", "nocache": 1})
        for url in urls:
            found = False
            while not found:
                self.assertLess(time.time(), begin + 30, f"{url} does not scrape")
                time.sleep(0.3)
                whole = f"{url}/api/v1/query?{form}"
                with contextlib.suppress(OSError), urllib.request.urlopen(whole) as answer:
                    found = bool(json.load(answer)["data"]["result"])


class Pages(ThreadingHTTPServer):
    """A web server that answers what it is told, and keeps what it was asked."""

    def __init__(self, answer: Callable[[str], tuple[int, dict[str, str], bytes]]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                length = int(handler.headers.get("Content-Length", 0))
                form = "?" * bool(length) + handler.rfile.read(length).decode()  # of a POST
                self.asked.append((handler.path + form, dict(handler.headers)))
                status, headers, body = answer(handler.path + form)
                handler.send_response(status)
                for pair in headers.items():
                    handler.send_header(*pair)
                handler.end_headers()
                handler.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *ignored: object) -> None:
                pass

        self.asked: list[tuple[str, dict[str, str]]] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()


Samples = Sequence[tuple[float, float]]


class Database:
    """What Prometheus would answer of these samples; a range is open at its left, as in 3."""

    def __init__(self, *, is_closed: bool = False) -> None:
        self.series: dict[frozenset[tuple[str, str]], Samples] = {}
        self.is_closed = is_closed  # as in Prometheus 2

    def add(self, name: str, samples: Samples, **labels: str) -> None:
        pairs = {"__name__": name, "job": "popcon", "instance": "x:9102"} | labels
        self.series[frozenset(pairs.items())] = samples

    def counter(self, library: str, samples: Samples, **labels: str) -> None:
        self.add("python_popcon_library_used", samples, library=library, **labels)

    def exporter(self, samples: Samples, **labels: str) -> None:
        self.add("process_start_time_seconds", samples, **labels)

    def over(self, query: str, end: float) -> list[tuple[dict[str, str], Samples]]:
        """What function({matchers}[1ms]) gives, or the bare matchers."""
        function, _, selector = query.rpartition("(")
        matchers = re.findall(r'(\w+)(=~?)("(?:[^"\\]|\\.)*")', selector)
        milliseconds = float((re.findall(r"\[(\d+)ms", selector) or ["inf"])[0])
        begin = end - milliseconds / 1000 - 1e-4 * self.is_closed
        found: list[tuple[dict[str, str], Samples]] = []
        for pairs, samples in self.series.items():
            labels = dict(pairs)
            some = [one for one in samples if begin < one[0] <= end + 1e-4]
            if function:
                some = [one for one in some if not math.isnan(one[1])]
            if some and all(
                re.fullmatch(json.loads(text) if how == "=~" else re.escape(json.loads(text)),
                             labels.get(label, "")) for label, how, text in matchers
            ):
                count = [(end, float(len(some)))] if "count_over" in function else some[-1:]
                found.append((labels, count if function else some))
        return found

    def answer(self, asked: str) -> tuple[int, dict[str, str], bytes]:
        path, _, query = asked.partition("?")
        form = dict(urllib.parse.parse_qsl(query))
        data: Any = [labels for labels, _ in self.over(form.get("match[]", "="), 1e12)]
        if path.endswith("/query"):
            found = self.over(form["query"], float(form["time"]))
            data = {"result": [{"metric": key, "values": [[when, str(value)] for when, value in of]}
                               for key, of in found]}
        elif path.endswith("_range"):  # of a count
            begin, end, step = (float(form[key]) for key in ("start", "end", "step"))
            times = [begin + step * n for n in range(int((end - begin) / step) + 1)]
            values = [[when, "1"] for when in times if self.over(form["query"], when)]
            data = {"result": [{"metric": {}, "values": values}] if values else []}
        return 200, {}, json.dumps({"status": "success", "data": data}).encode()


# Run in a large environment, with lists of libraries to be removed: what of them is needed by what
# stays, as the packaging library reads the requirements.
STAYS = """
import functools, importlib.metadata, json, sys
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

required = functools.cache(Requirement)
found = importlib.metadata.distributions()
libraries = {canonicalize_name(one.metadata["Name"]): one for one in found}
requirements = {name: [*map(required, one.requires or ())] for name, one in libraries.items()}
needed = set()
for gone in map(set, json.loads(sys.argv[1])):
    assert gone < libraries.keys()
    queue = [(name, "") for name in libraries.keys() - gone]
    known = set(queue)
    for name, extra in queue:
        for one in requirements.get(name, ()):
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                other = canonicalize_name(one.name)
                needed |= {f"{name} needs {other}"} if other in gone else set()
                new = {(other, extra) for extra in one.extras} - known
                known |= new
                queue += new
print(sorted(needed))
"""


PROMETHEUS = os.environ.get("POPCON_TEST_PROMETHEUS", "").split(":")
SERVERS = [path for path in (*PROMETHEUS, VICTORIAMETRICS) if path]
DAY = 86400.0
ONLY_SESSIONS = "popcon: only IPython and Jupyter report here by themselves: scripts are not known\n"


class TestUsage(UsageCase):
    def usage(self, *arguments: str, path: list[Path] | None = None, everyone: bool = False,
              **environ: Any) -> types.SimpleNamespace:
        """Run `usage` where self.site holds all that is installed."""
        settings = clean_environ(**{"NO_PROXY": "*", "COLUMNS": "80"} | environ)
        lock = types.SimpleNamespace(locked=lambda: everyone)
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.ExitStack() as stack:
            for patch in (mock.patch.dict(os.environ, settings, clear=True),
                          mock.patch.multiple(sys, path=[*map(str, path or [self.site])],
                                              meta_path=[*sys.meta_path], prefix=str(self.folder)),
                          mock.patch.object(popcon, "_set_up", lock),
                          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
                stack.enter_context(patch)
            try:
                status = popcon.main(["usage", *arguments])
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else 1
                err.write("" if isinstance(error.code, int) else f"{error.code}\n")
        self.assertTrue(out.getvalue().isascii(), out.getvalue())
        stderr = err.getvalue().replace(ONLY_SESSIONS, "")
        return types.SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=stderr)

    def counted(self, since: object = 1.0, **counts: float) -> str:
        """The path of an exporter's saved metrics with these counts."""
        line = 'python_popcon_library_used{{library="{}"}} {}\n'.format
        text = f"# HELP x\nprocess_start_time_seconds {since}\n"
        self.write(self.folder, {"metrics.txt": text + "".join(starmap(line, counts.items()))})
        return str(self.folder / "metrics.txt")

    def rows(self, *arguments: str, **options: Any) -> dict[str, dict[str, Any]]:
        ended = self.usage("--json", *arguments, **options)
        self.assertEqual((ended.returncode, ended.stderr), (0, ""))
        rows = json.loads(ended.stdout)
        self.assertEqual([row["library"] for row in rows], sorted({row["library"] for row in rows}))
        return {row.pop("library"): row for row in rows}

    def states(self, *arguments: str, **options: Any) -> dict[str, set[str]]:
        """The names of the libraries by their status."""
        found: dict[str, set[str]] = {}
        for name, row in self.rows(*arguments, **options).items():
            found.setdefault(row["status"], set()).add(name)
        return found

    def counts(self, *arguments: str, **options: Any) -> dict[str, int]:
        rows = self.rows(*arguments, **options)
        return {name: row["processes"] for name, row in rows.items() if row["processes"]}

    def of(self, **counts: float) -> tuple[str, str]:
        return "--metrics", self.counted(**counts)

    def requiring(self, name: str, *requirements: str, **options: Any) -> Path:
        lines = "".join(f"Requires-Dist: {text}\n" for text in requirements)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{lines}\nRequires-Dist: text\n"
        more = {"METADATA": text} | options.pop("more", {})
        return self.install(name, f"{name}.py", more=more, **options)

    def install_all(self, *names: str) -> None:
        for name in names:
            self.install(name, f"{name}.py")

    def test_json_tells_of_each_library_what_is_documented(self) -> None:
        self.requiring("Alpha", "beta", "gone; python_version < '3'", "tester; extra == 'test'")
        for name in ("beta", "tester"):
            self.install(name, f"{name}.py", f"{name}_more/__init__.py", source="pass\n")
        self.install("types-x", "x-stubs/__init__.pyi")
        rows = self.rows(*self.of(alpha=3, private=2))
        size = {name: sum(path.stat().st_size for path in self.site.glob(f"{name}-*/*")) + 10
                for name in ("beta", "tester")}
        common = {"version": "1.0", "processes": 0, "required_by": [], "reason": ""}
        needed = {"status": "required", "required_by": ["alpha"], "bytes": size["beta"]}
        self.assertEqual(rows["beta"], common | needed)
        self.assertEqual(rows["tester"], common | {"status": "unused", "bytes": size["tester"]})
        self.assertEqual((rows["alpha"]["status"], rows["alpha"]["processes"]), ("used", 3))
        self.assertEqual(rows["types-x"]["reason"], "nothing to import")
        absent = {"version": None, "processes": 2, "status": "absent", "bytes": None}
        self.assertEqual(rows["private"], common | absent)

    def test_what_a_library_that_stays_requires_stays(self) -> None:
        self.requiring("root", "Mid_Dle[fast] (>=1)", "doc; extra == 'doc'", "sub[ a , b ]>1")
        self.requiring("mid.dle", "leaf", 'quick; extra == "fast"', 'slow; extra == "slow"', "root")
        self.requiring("sub", "one; extra=='a'", "two; (extra == 'b') and os_name != 'x'")
        self.requiring("orphan", "only-orphans")
        self.requiring("broken", "saved ~~~ rubbish [; \\", "also @ https://x/y ; os_name > '3'")
        self.requiring("old", "tight; (extra == 'x')or(os_name >= '3')", "else; os_name == '-'")
        unused = {"slow", "doc", "only-orphans"}
        needed = {"leaf", "quick", "saved", "also", "one", "two", "tight", "else"}
        self.install_all(*(needed | unused))
        metrics = self.of(root=1, broken=1, old=1)
        states, ended = self.states(*metrics), self.usage(*metrics, "--unused")
        self.assertEqual((ended.returncode, ended.stderr), (0, ""))
        self.assertEqual(ended.stdout, "doc\nonly-orphans\norphan\nslow\n")
        expected = {"used": {"root", "broken", "old"}, "required": needed | {"mid-dle", "sub"}}
        self.assertEqual(states, expected | {"unused": unused | {"orphan"}})

    def test_what_source_trees_hidden_copies_and_eggs_require_stays(self) -> None:
        self.install_all("leaf", "new", "old", "other", "more")
        self.write(self.own, {"mine.egg-info/requires.txt": "leaf\n[x]\nother\n"})
        self.write(self.own, {"mine.egg-info/PKG-INFO": "Name: Mine\nVersion: 1.0\n"})
        requires = {"requires.txt": "\n[:python_version >= '3']\nmore\n"}
        self.install("egg", "egg.py", info="egg-1.0.egg-info", more=requires, record=None)
        (self.site / "egg-1.0.egg-info/METADATA").rename(self.site / "egg-1.0.egg-info/PKG-INFO")
        self.requiring("twice", "new")
        self.requiring("twice", "old", folder=self.folder / "shadowed")
        path = [self.own, self.site, self.site, self.folder / "shadowed", self.folder / "none"]
        rows = self.rows(*self.of(twice=1), path=path)
        needed = {"leaf": "mine", "more": "egg", "new": "twice", "old": "twice"}
        for name, row in rows.items():
            self.assertEqual(row["required_by"], [needed[name]] if name in needed else [])
        self.assertEqual((rows["other"]["status"], rows["egg"]["status"]), ("unused", "unknown"))
        self.assertEqual(rows.keys(), {*needed, "other", "egg", "twice"})

    def test_libraries_that_share_a_module_or_a_command_stay_together(self) -> None:
        self.install("full", "shared/__init__.py", "full.py")
        self.install("skinny", "shared/__init__.py", "LICENSE")
        self.install("other", "other.py", "LICENSE")
        for name in ("tool", "twin"):
            self.install(name, f"{name}.py", "../../bin/run", source="#!/usr/bin/python\n")
        states = self.states(*self.of(full=1, tool=1), everyone=True)
        expected = {"used": {"full", "tool"}, "required": {"skinny", "twin"}, "unused": {"other"}}
        self.assertEqual(states, expected)

    def test_what_cannot_be_judged_is_shown_with_the_true_reason(self) -> None:
        python, silent = "#!/usr/bin/python\n", "its commands do not report"
        commands = {"entry_points.txt": "[console_scripts]\nx = y:main\n"}
        plugin = {"entry_points.txt": "[pytest11]\nx = y:main\n"}
        editable = {"direct_url.json": '{"url": "file:///x", "dir_info": {"editable": true}}'}
        kinds: list[tuple[str, str, list[str], dict[str, Any]]] = [
            ("", "unused", ["unused.py"], {}),
            ("", "bundles", ["b.py", "bundles.libs/libx-1a2b3c4d.so.3", "lib.abi3.so"], {}),
            ("", "ends", ["ends.py"], {"source": "import os\nos.execv('x', [])"}),
            ("nothing to import", "meta", [], {}),
            ("nothing to import", "stubs", ["thing-stubs/__init__.pyi"], {}),
            ("holds shared libraries", "gpu-runtime", ["gv/__init__.py", "gv/lib/librt.so.12"], {}),
            ("holds shared libraries", "winlib", ["winlib.py", "winlib/x.dll"], {}),
            ("odd paths in its RECORD", "winwheel", [], {"record": "winwheel\\__init__.py,,\n"}),
            ("odd paths in its RECORD", "split", ["s.py", "../lib64/site-packages/s/x.py"], {}),
            ("odd paths in its RECORD", "rooted", [], {"record": f"{self.site}/../rooted.py,,\n"}),
            ("takes part in every start", "starts", ["starts.py", "starts.pth"], {}),
            ("extends Jupyter", "lab", ["lab.py", "../../share/jupyter/labextensions/x.json"], {}),
            ("serves Jupyter", "serves", ["s2.py", "../../etc/jupyter/jupyter_x.d/x.json"], {}),
            ("a plug-in, others find it", "plug", ["plug.py"], {"more": plugin}),
            ("has no RECORD of its files", "bare", ["bare.py"], {"record": None}),
            ("editable, never counted", "mine", ["__editable__mine.py"], {"more": editable}),
            ("runs sessions, or installs", "pip", ["pip.py"], {}),
            ("to be kept", "kept-one", ["kept_one.py"], {}),
            ("its metadata have no name", "nobody", ["n.py"], {"more": {"METADATA": "Version: 1"}}),
            ("its metadata have no name", "rubbish", [],
             {"more": {"METADATA": "\0"}, "record": '"\0,\n' + "x" * 200000 + '"\n'}),
            (silent, "command", ["command.py"], {"more": commands}),
            (silent, "script", ["script.py", "../../bin/script"], {"source": python}),
            (silent, "leaves", ["l/r.py"], {"source": "from os import execvpe", "more": commands}),
            (silent, "binary", ["binary.py", "../../bin/fast"], {"source": "\x7fELF"}),
            ("", "module", ["module/__main__.py"], {"source": "signal.raise_signal(15)"}),
        ]
        for reason, name, files, more in kinds:
            self.install(name, *files, **more)
            with self.subTest(name=name):
                keep = ["--keep", "Kept_*"] * (name == "kept-one")
                row = self.rows(*self.of(other=1), *keep)[name]
                self.assertEqual((row["status"], row["reason"]),
                                 ("unknown" if reason else "unused", reason))
                self.assertLessEqual(len(reason), 27)  # to be read in 80 columns
        rows = self.rows(*self.of(other=1), everyone=True)
        unused = {name for name, row in rows.items() if row["status"] == "unused"}
        self.assertEqual(unused, {"unused", "bundles", "ends", "kept-one", "command", "script"})
        for name in ("leaves", "module", "binary"):
            self.assertEqual(rows[name]["reason"], silent)

    def test_extras_of_what_does_not_report_cannot_be_judged(self) -> None:
        more = {"entry_points.txt": "[console_scripts]\nx = langserver:main\n"}
        extras = 'renamer; extra == "all"', "langserver[all]; extra == 'x'"
        self.requiring("langserver", *extras, more=more)
        self.requiring("renamer", "deep")
        self.requiring("bigml", 'viewer; extra == "gui"')
        self.requiring("pip", 'keys; extra == "safe"')
        self.install_all("deep", "viewer", "keys")
        rows = self.rows(*self.of(bigml=1))
        for name, *expected in [("renamer", "unknown", "optional: langserver"),
                                ("deep", "required", ""), ("viewer", "unused", ""),
                                ("keys", "unknown", "optional: pip")]:
            self.assertEqual([rows[name]["status"], rows[name]["reason"]], expected)

    def test_what_is_loaded_at_start_or_by_configuration_is_not_called_unused(self) -> None:
        for name in ("drawn", "contents", "kernel", "startup", "remark", "early"):
            self.install(name, f"{name}_module.py")
        self.write(self.folder, {
            "etc/ipython/ipython_config.py": "# such as remark_module\nc.X = 'drawn_module'",
            "etc/ipython/startup/50-x.py": "import startup_module",
            "etc/jupyter/jupyter_server_config.py": "c.ServerApp.x = 'contents_module.Manager'",
            "share/jupyter/kernels/x/kernel.json": '{"argv": ["python", "-m", "kernel_module"]}',
        })
        early = types.ModuleType("early_module")
        early.__file__ = str(self.site / "early_module.py")
        with mock.patch.dict(sys.modules, early_module=early):
            rows = self.rows(*self.of(other=1))
        named = {name for name, row in rows.items() if "Jupyter's settings" in row["reason"]}
        self.assertEqual(named, {"contents", "drawn", "kernel", "startup"})
        self.assertEqual(rows["early"]["reason"], "loaded at every start")
        self.assertEqual(rows["remark"]["status"], "unused")

    def test_the_rarely_used_are_told_apart_on_request(self) -> None:
        self.requiring("rare", "rare-need", "unused-need", "base")
        self.requiring("often", "base")
        self.requiring("plug", more={"entry_points.txt": "[pytest11]\nx = plug\n"})
        self.install_all("rare-need", "unused-need", "base", "never")
        counts = {"rare": 4, "rare-need": 2, "often": 5, "base": 1, "plug": 1, "private": 1}
        metrics = self.of(**counts)
        text = self.usage(*metrics, "--at-most", "4").stdout
        groups = {title: sorted(re.findall(r"(?m)^ +\d+  (\S+)", group))
                  for title, group in re.findall(r"(?s)\n\n([A-Z][^(\n]*) \((.*?)(?=\n\n)", text)}
        expected = {
            "Used": ["base", "often", "plug"],
            "Rarely used, by at most 4 processes": ["rare", "rare-need", "unused-need"],
            "Can go": ["never"],
            "Counted, but not installed here": ["private"],
        }
        self.assertEqual(groups, expected)
        unused = self.usage(*metrics, "--at-most", "4", "--unused").stdout.split()
        self.assertEqual(unused, ["never", "rare", "rare-need", "unused-need"])
        self.assertEqual(self.usage(*metrics, "--unused").stdout, "never\n")
        self.assertEqual(self.rows(*metrics, "--at-most", "4"), self.rows(*metrics))

    def test_counts_that_do_not_reach_back_are_no_answer_yet(self) -> None:
        self.install("alpha", "alpha.py")
        young = "--metrics", self.counted(since=time.time() - 12 * DAY - 5, other=1)
        said = "No answer yet: the counts reach back 12 of 90 days"
        for shape in ((), ("--json",), ("--unused",), ("--unused", "--at-most", "3")):
            ended = self.usage(*young, *shape)
            self.assertEqual((ended.returncode, "alpha" in ended.stdout),
                             (1, "--unused" not in shape))
            hint = f"popcon: {said}; ask for a shorter --window if that is long enough\n"
            self.assertEqual(ended.stderr, hint)
        text = self.usage(*young).stdout
        self.assertEqual(text.splitlines()[-1], said)
        self.assertRegex(text, r"(?m)^   1  alpha .* No answer yet$")
        self.assertEqual(self.usage(*young, "--unused", "--window", "12d").stdout, "alpha\n")
        self.assertIn("12 of 14.5 days", self.usage(*young, "--window", "2w12h").stderr)

    def test_the_table_fits_the_terminal_in_ascii(self) -> None:
        self.install_all("alpha", "beta", "gamma", "delta-" + "x" * 60)
        self.install("plug", "plug.py", more={"entry_points.txt": "[pytest11]\nx = plug\n"})
        self.requiring("user", "need")
        self.install("need", "need.py", source="#" * 1_300_000)
        metrics = self.of(alpha=1000, beta=500, private=3, user=1)
        for columns in ("60", "80", "200", "0"):
            text = self.usage(*metrics, COLUMNS=columns).stdout
            self.assertLessEqual(max(map(len, text.splitlines()[:-2])), int(columns) or 80)
            self.assertLessEqual(max(map(len, re.findall("#+", text))), 40)
        for line in (r"\Arank  library +size  processes\n\nUsed \(3, 0\.0 MB\)\n",
                     r"   1  alpha +0\.0 MB      1,000  #{15,}\n   2  beta .* 500  #{8,}\n",
                     r"\n   1  need +1\.3 MB  user\n",
                     r"\n   1  plug +0\.0 MB  a plug-in, others find it\n",
                     r"\n2 of 7 libraries can go, 0\.0 MB of 1\.3 MB\.\n"):
            self.assertRegex(self.usage(*metrics).stdout, line)

    def test_it_says_whose_imports_are_known_and_since_when(self) -> None:
        self.install("alpha", "alpha.py")
        for everyone, who in ((False, "No session"), (True, "Nobody")):
            lines = self.usage(*self.of(beta=1), everyone=everyone).stdout.splitlines()
            self.assertRegex(lines[-2], r"^Counted since \d{4}-\d\d-\d\d \d\d:\d\d UTC[+-]\d{4}\.$")
            said = f"{who} has imported them since then, and nothing that stays needs them."
            self.assertEqual(lines[-1], said)
        ended = self.usage(*self.of(beta=1), "--unused", "--keep", "alpa", "x*")
        told = "popcon: nothing installed is called '{}', which was to be kept\n".format
        self.assertEqual((ended.stdout, ended.stderr), ("alpha\n", told("alpa") + told("x*")))

    def test_counts_below_k_are_veiled(self) -> None:
        self.install_all("alpha", "beta", "gamma")
        metrics = self.of(beta=4, alpha=3, gamma=5, private=1)
        shown = self.usage(*metrics, "--at-least", "5").stdout
        counts = re.findall(r"(?m)^ +\d+  ([a-z]+) +(?:0.0 MB|\?) +(\S+)", shown)
        expected = {"gamma": "5", "alpha": "<5", "beta": "<5", "private": "<5"}
        self.assertEqual(counts, [*expected.items()])
        for name, row in self.rows(*metrics, "--at-least", "5").items():
            self.assertEqual(row["processes"], 5 if name == "gamma" else None)

    def test_sizes_behind_links_are_those_of_the_files(self) -> None:
        self.write(self.folder, {"cache/linked.py": "x" * 2_000_000})
        self.install("linked", "linked.py", "hard.py", "gone.py")
        for name, link in (("linked", os.symlink), ("hard", os.link)):
            (self.site / f"{name}.py").unlink()
            link(self.folder / "cache/linked.py", self.site / f"{name}.py")
        (self.site / "gone.py").unlink()
        size = self.rows(*self.of(other=1))["linked"]["bytes"]
        self.assertEqual(size // 1_000_000, 4)

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
        self.assertIn("reach back 0 of 90 days", self.usage(*saved).stderr)
        os.utime(saved[1], (now - 3 * DAY,) * 2)
        self.assertIn("popcon: the file is 3 days old", self.usage(*saved, "--unused").stderr)

    def test_odd_clocks_and_closed_streams_are_no_traceback(self) -> None:
        self.install("alpha", "alpha.py")
        for since, status in ((1e300, 1), (-1e300, 0), ("NaN", 1), ("+Inf", 1)):
            ended = self.usage("--metrics", self.counted(since=since, x=1))
            self.assertEqual((ended.returncode, ended.stderr.count("\n")), (status, status))
        environ = clean_environ(PYTHONPATH=os.pathsep.join([str(self.site), str(HERE)]))
        for stream in ("stdout", "stderr"):
            code = f"import popcon, sys; sys.{stream} = None; sys.exit(popcon.main())"
            command = [sys.executable, "-S", "-c", code, "usage", *self.of(x=1), "--unused"]
            run = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
            self.assertEqual((run.returncode, run.stdout), (0, "alpha\n" * (stream == "stderr")))
            self.assertNotIn("Traceback", run.stderr)

    def database(self, **options: Any) -> tuple[Database, tuple[str, ...], float]:
        """A database, the arguments that ask it for the last 100 days, and when these began."""
        database = Database(**options)
        pages = Pages(database.answer)
        self.addCleanup(pages.server_close)
        now = round(time.time()) - 3.0
        return database, ("--prometheus", pages.url, "--window", "100d"), now - 100 * DAY

    def test_counts_are_exact_through_restarts_markers_and_clocks_that_are_set(self) -> None:
        for is_closed in (False, True):
            database, arguments, start = self.database(is_closed=is_closed)
            first = [start - 1800 + n * DAY for n in range(50)]
            second = [first[-1] + 1800, first[-1] + DAY]
            third = [second[-1] + 1800 + 0.5 * n * DAY for n in range(100)]
            starts = [(when, 5.0 + (n > 9)) for n, when in enumerate(first)]  # its clock was set
            starts += [(first[-1] + 60, math.nan), *((when, second[0] - 9) for when in second)]
            database.exporter([*starts, *((when, third[0] - 9) for when in third)])
            ends = [(third[-1], 1.0)]
            same = [(when, 1.0) for when in [*first, *second, *third]]
            database.counter("again", same)  # once before, and once in each later life
            samples = [(when, 7.0) for when in first] + [(first[-1] + 60, math.nan)]
            database.counter("before", samples)
            database.counter("once", [(second[-1], 1.0), (second[-1] + 60, math.nan)])
            database.counter("late", ends)
            database.counter("late", ends, namespace="prod")
            database.counter("not a name", ends)
            self.assertEqual(self.counts(*arguments), {"again": 2, "late": 2, "once": 1})

    def test_exporters_of_two_clusters_with_the_same_address_are_told_apart(self) -> None:
        database, arguments, start = self.database()
        for cluster, value in (("a", 2.0), ("b", 3.0)):
            times = [start + (n + 0.1 * value) * DAY for n in range(-1, 100)]
            database.exporter([(when, value) for when in times], cluster=cluster, namespace="mon")
            samples = [(when, value + 4 * (when > start + DAY)) for when in times]
            database.counter("alpha", samples, cluster=cluster, namespace="prod")
            samples = [(when, value) for when in times]
            database.counter("beta", samples, cluster=cluster, namespace="mon")
        self.install("beta", "beta.py")
        for labels, whole in database.series.items():
            database.series[labels] = [one for one in whole if one[0] > start - 3600]
        self.assertEqual(self.counts(*arguments), {"alpha": 13, "beta": 5})
        self.assertEqual(self.counts(*arguments, "--match", "{ }"), {"alpha": 13, "beta": 5})
        some = self.counts(*arguments, "--match", '{cluster="a", }')
        self.assertEqual(some, {"alpha": 6, "beta": 2})
        self.fails((*arguments, "--match", '{x="y"}'), "no count of .* rose")

    def test_series_that_end_before_their_exporter_are_no_answer(self) -> None:
        self.install_all("alpha", "beta")
        said = "No answer: counters ended before their exporter; give no ttl in its mapping"
        for gone, back, total in ((2, 1, 2), (1, 1, 1), (3, None, 1)):
            with self.subTest(gone=gone, back=back):
                database, arguments, start = self.database()
                times = [start + (n - 0.02) * DAY for n in range(101)]
                database.exporter([(when, 5.0) for when in times])
                some = [(when, gone) for when in times[:40]] + [(times[40], math.nan)]
                some += [(when, back) for when in times[60:]] if back else []
                database.counter("alpha", some, namespace="one")
                others = [(when, 1 + (n > 50)) for n, when in enumerate(times)]
                database.counter("used", others, namespace="two")
                if gone == 2:
                    database.counter("alpha", others, namespace="two")
                for shape, last in (((), [said]), (("--unused",), [])):
                    ended = self.usage(*arguments, *shape)
                    self.assertEqual((ended.returncode, ended.stderr), (1, f"popcon: {said}\n"))
                    self.assertEqual(ended.stdout.splitlines()[-1:], last)
                found = json.loads(self.usage(*arguments, "--json").stdout)
                counts = {row["library"]: row["processes"] for row in found}
                self.assertEqual(counts["alpha"], total if gone == 2 else 0)

    def test_the_counts_reach_back_as_far_as_exporters_and_popcon_were_there(self) -> None:
        self.install("alpha", "alpha.py")
        young = "reach back 12 of 100 days"
        # When an exporter was scraped, and since when it had a counter.
        for begin, finish, counted, said in [(-0.02, 100, 0, ""), (88, 100, 88, young),
                                             (-0.02, 100, 88, young),
                                             (-0.02, 90, 0, "reach back 0 of 100 days")]:
            with self.subTest(begin=begin, finish=finish, counted=counted):
                database, arguments, start = self.database()
                steps = range(int((finish - begin) * 2) + 1)
                times = [start + (begin + 0.5 * n) * DAY for n in steps]
                database.exporter([(when, 5.0) for when in times])
                there = [when for when in times if when >= start + (counted - 0.1) * DAY]
                database.counter("other", [(when, 1.0 + n) for n, when in enumerate(there)])
                ended = self.usage(*arguments, "--unused")
                expected = (1, "") if said else (0, "alpha\n")
                self.assertEqual((ended.returncode, ended.stdout), expected)
                self.assertIn(said, ended.stderr)
        with self.subTest("where restarts are not known, too much is counted"):
            database, arguments, start = self.database()
            times = [start + (n - 0.02) * DAY for n in range(101)]
            database.counter("other", [(when, 9.0) for when in times])
            rows = json.loads(self.usage(*arguments, "--json").stdout)
            found = {row["library"]: (row["status"], row["processes"]) for row in rows}
            self.assertEqual(found, {"alpha": ("unused", 0), "other": ("absent", 9)})

    def test_odd_answers_get_one_sentence_and_no_traceback(self) -> None:
        def series(*labels: Any, **more: Any) -> bytes:
            return json.dumps({"status": "success", "data": labels} | more).encode()

        def result(*value: Any) -> bytes:
            return json.dumps({"data": {"result": [{"metric": good, "value": value}]}}).encode()

        good = {"library": "alpha", "job": "x\33"}
        page = b"<!DOCTYPE html><title>Log\33[2Jin</title>" * 100
        moved = {"Location": "https://login.example/\33[2J"}
        strange, none = "does not answer as Prometheus does, but '", "no count of .* rose in 90 d"
        cut, chunked = "cannot be read: .*(cut off|Incomplete)", {"Transfer-Encoding": "chunked"}
        for status, headers, texts, said in [  # answers for the series, and to other questions
            (302, moved, [b""], r"answers 302 Found https://login.example/ \[2J$"),
            *((200, {}, [text], strange)
              for text in (page, b"", b"[1, 2]", b"[" * 100000, series(5), series(good)[:-2])),
            (200, {"Content-Length": "9"}, [b"{"], cut),
            (200, chunked, [b"ff\r\n{"], cut),
            (200, {}, [series(good), result(1, [])], strange),
            (200, {}, [series(good), result(1, None)], strange),
            *((200, {}, [series(good), result(*odd)], none)
              for odd in ((1, "NaN"), (math.nan, "1"), (1e300, "1"), (1, "Inf"))),
            *((200, {}, [text, b'{"data": {"result": []}}'], none)
              for text in (series(good), series())),
            (200, {}, [series(good, warnings=["a store is out"])], "not know all: a store is out"),
            (400, {}, [b'{"error":"parse error: \\"x\\""}'], "answers 400 .* parse error: .*x"),
            (401, {}, [page], "answers 401 Unauthorized$"),
            (503, {}, [b"[]"], "answers 503 Service Unavailable$"),
            (503, chunked, [b"no size"], cut),
        ]:
            def answer(asked: str, status: int = status, headers: Any = headers,
                       texts: Any = texts) -> Any:
                return status, headers, texts[0 if "/series" in asked else -1]

            with self.subTest(status=status, texts=texts), Pages(answer) as pages:
                self.fails(("--prometheus", pages.url), said)
        nowhere, metrics = f"http://127.0.0.1:{free_port()}", self.counted(alpha=1, beta=1)
        whole = Path(metrics).read_bytes()
        self.write(self.folder, {"part.txt": whole[:-1].decode()})
        short = {"Content-Length": str(len(whole))}
        with (Pages(lambda asked: (200, {}, page)) as pages,
              Pages(lambda asked: (200, short, whole[:-22])) as cut_off):
            for source, said in [
                (("--prometheus", nowhere), "cannot be read: .*refused$"),
                (("--metrics", nowhere + "/metrics?token=hunter2"), "metrics cannot be .*refused$"),
                (("--metrics", pages.url), "no exporter's metrics, or cut off: '<!DOCTYPE html>"),
                (("--metrics", "/no/such/file"), "No such file"),
                (("--metrics", "http://[::1"), "cannot be read: Invalid IPv6 URL"),
                (("--metrics", "/"), "is no exporter's metrics"),
                (("--metrics", str(self.folder / "part.txt")), "part.txt is no .* or cut off"),
                (("--metrics", cut_off.url), "its answer is cut off"),
                (("--metrics", metrics, "--metric", "a(b"), r"no count of a\(b rose in .* at /"),
                (("--prometheus", "http://x:y"), "cannot be read: nonnumeric port"),
                (("--prometheus", f"file://{self.folder}/part.txt#"), "cannot be read: "),
                (("--prometheus", "prometheus:9090"), "cannot be read: unknown url type"),
            ]:
                with self.subTest(source=source):
                    self.fails(source, said)
        wrong: Any = {"PYTHON_POPCONTEST_STATSD_PREFIX": "a b"}
        self.fails(("--metrics", metrics), "PYTHON_POPCONTEST_STATSD_PREFIX='a b': must", **wrong)

    def fails(self, arguments: tuple[str, ...], said: str, status: int = 1, **environ: Any) -> None:
        """Prove that it prints one short sentence, and nothing of what it was not told."""
        ended = self.usage(*arguments, **environ)
        self.assertEqual((ended.returncode, ended.stdout), (status, ""))
        self.assertRegex(ended.stderr, r"\Apopcon: [ -~]{1,320}\n\Z")
        self.assertRegex(ended.stderr.rstrip("\n"), said)
        self.assertNotIn("hunter2", ended.stderr)

    def test_wrong_usage_gets_one_sentence(self) -> None:
        metrics, server = ("--metrics", self.counted(x=1)), ("--prometheus", "http://127.0.0.1:9")
        self.write(self.folder, {"bad.txt": "hunter2\n"})
        for status, arguments, said in [
            (2, (), "one of the arguments --prometheus --metrics is required"),
            (2, (*metrics, *server), "not allowed with argument"),
            (2, (*metrics, "--unused", "--json"), "not allowed with argument"),
            (2, (*metrics, "--at-least", "few"), "invalid int value"),
            *((2, (*metrics, "--window", text), "--window: invalid seconds value")
              for text in ("", "90", "d", "1.5d", "5 d")),
            (1, (*metrics, "--match", "{a='b'}"), "--match is for --prometheus"),
            *((1, (*server, "--match", text), "must be as in PromQL, .* and not about the library")
              for text in ("{}x", '{a="b"', "x{}", '{library="numpy"}', '{ library =~ "a.*" }',
                           "{a='b',library!~`x`}", '{"library"!="x"}', "{'library' = 'x'}")),
            *((1, (*server, "--header", text), "must be 'Name: value', or @FILE")
              for text in ("hunter2", "X: hunter2\u20ac", "a b: hunter2", "@/no/such/file",
                           f"@{self.folder}/bad.txt")),
        ]:
            with self.subTest(arguments=arguments):
                self.fails(arguments, said, status=status)

    def test_a_header_is_sent_and_never_told(self) -> None:
        self.write(self.folder, {"secret.txt": "Authorization: Bearer hunter2\r\n\nX-Two: b\n"})
        for secret in ("Authorization: Bearer hunter2", f"@{self.folder / 'secret.txt'}"):
            with Pages(lambda asked: (400, {}, b'{"error": "wrong"}')) as pages:
                given = "--header", "X-Scope-OrgID: a", "--header", secret
                self.fails(("--prometheus", f"{pages.url}/tenant/", *given), "answers 400 .*wrong$")
            ((path, headers),) = pages.asked
            self.assertTrue(path.startswith("/tenant/api/v1/series?"), path)
            self.assertEqual(headers["Authorization"], "Bearer hunter2")
            self.assertEqual(headers["X-Scope-Orgid"], "a")

    # With real servers, and in a large environment.

    @unittest.skipUnless(EXPORTER and SERVERS, "needs POPCON_TEST_STATSD_EXPORTER and servers")
    def test_real_servers_give_exact_counts_whatever_restarts(self) -> None:
        self.install_all("before", "again", "once", "twice", "everywhere", "spaces", "never")

        def use(port: int, *names: str, space: str = "") -> None:
            prefix = f"python_popcon.{space and f'namespace.{space}.'}library_used"
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                for name in names:
                    udp.sendto(popcon.statsd_line(name, prefix), ("127.0.0.1", port))

        with contextlib.ExitStack() as stack:
            other, port = stack.enter_context(self.exporter())[1].place
            with self.exporter() as (_, metrics):
                first = metrics.place
                urls = [stack.enter_context(self.server(path, first[1], port)) for path in SERVERS]
                use(first[0], "before", "again")
                use(first[0], "before", space="prod")
                self.wait_for_scrapes(*urls)
                start = time.time()
                use(first[0], "again", "once", "twice", "everywhere")
                use(other, "everywhere")
                use(first[0], "spaces", space="prod")
                use(first[0], "spaces", "spaces", space="test")
                self.wait_for_scrapes(*urls)
            stack.enter_context(self.exporter(first))
            self.wait_for_scrapes(*urls)
            use(first[0], "twice")
            self.wait_for_scrapes(*urls)
            for url, path in zip(urls, SERVERS):
                with self.subTest(server=path):
                    self.check_server(url, start)

    def check_server(self, url: str, start: float) -> None:
        def since_then() -> tuple[str, ...]:
            return "--prometheus", url, "--window", f"{(time.time() - start) * 1000:.0f}ms"

        expected = {"again": 1, "once": 1, "twice": 2, "everywhere": 2, "spaces": 3}
        self.assertEqual(self.counts(*since_then()), expected)
        some = self.counts(*since_then(), "--match", '{namespace="prod"}')
        self.assertEqual(some, {"spaces": 1})
        self.assertEqual(self.usage(*since_then(), "--unused").stdout, "before\nnever\n")
        # All there is, for people who ask for more than that.
        ended = self.usage("--prometheus", url, "--unused")
        self.assertEqual((ended.returncode, ended.stdout), (1, ""))
        self.assertIn("reach back 0 of 90 days", ended.stderr)
        self.fails((*since_then(), "--match", '{x="y"}'), "no count of .* rose")
        self.fails((*since_then(), "--match", '{x=~"("}'), "answers (400|422) .*:")

    @unittest.skipUnless(LARGE, "needs POPCON_TEST_LARGE, the python of a large environment")
    def test_nothing_that_stays_needs_what_can_go_in_a_large_environment(self) -> None:
        names = ("pandas", "scikit-learn", "matplotlib", "requests", "ruamel-yaml", "spacy")
        metrics = self.of(**dict.fromkeys((*names, "google-cloud-storage"), 1))

        def run(*arguments: str) -> str:
            command = [LARGE, "-W", "ignore", *arguments]
            ended = subprocess.run(command, env=clean_environ(), capture_output=True, text=True)
            self.assertIn((ended.returncode, ended.stderr), ((0, ""), (0, ONLY_SESSIONS)))
            return ended.stdout

        lists = []
        for before in ("pass", "import popcon; popcon.setup_reporter()"):
            tell = "-c", f"{before}; import popcon; popcon.main()", "usage", *metrics
            lists.append(run(*tell, "--unused").split())
            self.assertGreater(len(json.loads(run(*tell, "--json"))), 500)
        self.assertGreater(len(lists[0]), 20)
        self.assertLess(set(lists[0]), set(lists[1]))  # where all report, commands can be judged
        self.assertEqual(run("-c", STAYS, json.dumps(lists)), "[]\n")


class TestReadme(Case):
    def test_its_start_up_lines_report_and_are_silent_without_popcon(self) -> None:
        self.install("alpha", "alpha.py")
        self.write(self.own, {"start/sitecustomize.py": readme_start_up()})
        path = [str(self.own / "start"), str(self.site)]
        with Server() as server:
            for folders, expected in ([*path, str(HERE)], ["alpha"]), (path, []):
                settings = server.settings | {"PYTHONPATH": os.pathsep.join(folders)}
                ended = self.run_python("import alpha", **settings)
                self.assertEqual((ended.returncode, ended.stdout, ended.stderr), (0, "", ""))
                self.assertEqual(server.names(), expected)

    def test_its_dockerfiles_switch_it_on(self) -> None:
        venv.create(self.folder / "env", symlinks=True)
        shutil.copy(SOURCE, self.own)
        path = f"{self.folder / 'env' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        lines = re.findall("(?m)^RUN (.*)$", "".join(readme_blocks("dockerfile")))
        self.assertTrue(lines)
        for line in lines:
            ended = subprocess.run(
                line.replace("/tmp/popcon.py", str(self.own / "popcon.py")), shell=True, cwd=self.own,
                env=clean_environ(PYTHONPATH="", PATH=path), capture_output=True, text=True,
            )  # fmt: skip
            self.assertEqual((ended.returncode, ended.stderr), (0, ""), ended.stdout)
            self.assertRegex(ended.stdout, "(?m)^ok +reporting .*popcon-selftest:1")

    def quick_start(self, prometheus: str) -> tuple[int, list[str]]:
        """The status of README's quick start's last command, and what all of them printed."""
        place = self.folder / f"start-{free_port()}"
        venv.create(place / "bare", symlinks=True)
        for name, path in ("statsd_exporter", EXPORTER), ("prometheus", prometheus):
            (place / "bare" / "bin" / name).symlink_to(path)
        ports = {"9125": free_port(socket.SOCK_DGRAM), "9102": free_port(), "9090": free_port()}

        def moved(text: str) -> str:
            return re.sub(r"\b(9125|9102|9090)\b", lambda found: str(ports[found[0]]), text)

        (place / "here").mkdir()  # the empty folder
        shutil.copy(SOURCE, place / "here")
        (scraping,) = (text for text in readme_blocks("yaml") if text.startswith("scrape_"))
        texts = {"mapping.yml": readme_mapping(), "prometheus.yml": moved(scraping)}
        self.write(place / "here", texts)
        ask = "import sys, urllib.parse as p, urllib.request as r; "
        ask += "[print(r.urlopen(sys.argv[1] + p.quote(q)).read().decode()) for q in sys.argv[2:]]"
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        ((uninstall, end),) = re.findall("(?m)^To end it: `(.+?)`, and `(.+?)`", readme)
        lines = ["set -e", "".join(readme_blocks("sh")[:2]).rstrip() + " || status=$?"]
        lines += [f"python -c '{ask}' http://localhost:9090/api/v1/query?query= \"$@\""]
        lines += [uninstall, "ls demo/lib/python*/site-packages", end, "wait", "exit $status"]
        command = ["bash", "-c", moved("\n".join(lines)), "bash", *readme_blocks("promql")]
        path = f"{place / 'bare' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environ = clean_environ(PATH=path, PYTHONPATH="", NO_PROXY="*", COLUMNS="80")
        environ["PYTHON_POPCONTEST_STATSD_PORT"] = str(ports["9125"])
        with (place / "out").open("w+", encoding="utf-8") as out:
            shell = subprocess.Popen(command, cwd=place / "here", env=environ, stdout=out,
                                     stderr=out, start_new_session=True)  # fmt: skip
            try:
                status = shell.wait(120)
            finally:
                with contextlib.suppress(ProcessLookupError):  # README's `kill` has ended all
                    os.killpg(shell.pid, signal.SIGKILL)
                shell.wait()
            out.seek(0)
            return status, out.read().splitlines()

    @unittest.skipUnless(EXPORTER and PROMETHEUS[0], "needs POPCON_TEST_STATSD_EXPORTER and "
                         "POPCON_TEST_PROMETHEUS, paths of the real ones")
    def test_its_quick_start_leads_to_a_table_and_its_promql_to_the_same_counts(self) -> None:
        with ThreadPoolExecutor(len(PROMETHEUS)) as pool:  # for each waits 20 s
            starts = [pool.submit(self.quick_start, path) for path in PROMETHEUS]
        for path, start in zip(PROMETHEUS, starts):
            with self.subTest(server=path):
                status, lines = start.result()
                said = "\n".join(lines)
                self.assertEqual(status, 1, said)  # as it says: it is too early
                self.assertRegex(said, r"(?m)^ +1  pip +[\d.]+ MB +1  #")
                self.assertIn("No answer yet: the counts reach back 0 of 90 days", said)
                answers = [json.loads(line)["data"]["result"] for line in lines if line[:1] == "{"]
                self.assertEqual(len(answers), len(readme_blocks("promql")), said)
                for (series,) in answers:
                    self.assertEqual(series["metric"], {"library": "pip"})
                    self.assertEqual(series["value"][1], "1")
                self.assertIn("pip", lines)  # what `ls` saw after `uninstall`
                self.assertNotRegex(said, r"(?m)^popcon\.(py|pth)$")

    def test_its_other_commands_are_understood(self) -> None:
        others = {"xargs -r python -m pip uninstall --yes"}
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        blocks = [block for block in readme_blocks("sh")[2:] if "OMPI" not in block]  # as below
        lines = re.split(r"\s*(?:&&|\|)\s*|\n", "".join(blocks).strip())
        self.assertGreater(len(lines), 3)
        lines += re.findall(r"(?<!`)`([^`\n]*\bpython (?:-m popcon|popcon\.py) [^`\n]+)`", readme)
        self.assertGreater(len(lines), 10)
        for line in lines:
            line = re.sub(r" [<>] \S+", "", line)
            command = re.sub(r"^(sudo )?\S*\bpython (-m popcon|popcon\.py) ", "popcon ", line)
            name, *arguments = shlex.split(command)
            with self.subTest(line), contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    if line not in others:
                        self.assertEqual(name, "popcon")
                        popcon.command_line().parse_args(arguments)
                except SystemExit:
                    self.fail(said.getvalue())

    @unittest.skipIf(os.name == "nt", "its shell is another")
    def test_its_line_for_mpi_lets_one_rank_report(self) -> None:
        (line,) = (block for block in readme_blocks("sh") if "OMPI" in block)
        for name in "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "HOME":
            for rank, expected in ("0", ""), ("1", "" if name == "HOME" else "1"):
                with self.subTest(name, rank=rank):
                    environ = clean_environ(**{name: rank})
                    command = ["sh", "-ec", f"{line}echo $DO_NOT_TRACK"]
                    said = subprocess.check_output(command, env=environ, text=True)
                    self.assertEqual(said, f"{expected}\n")

    def test_names_every_setting_with_its_default(self) -> None:
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        rows = dict(re.findall(r"(?m)^\| `(\w+)` \| (.+?) \|", readme))
        for name, (default, *_) in popcon.SETTINGS.items():
            self.assertEqual(rows.pop(name), f"`{default}`" if default else "none")
            self.assertIn(name, popcon.__doc__ or "")
        self.assertLessEqual({"DO_NOT_TRACK", "PYTHON_POPCONTEST_DEBUG"}, rows.keys())

    def test_python_in_it_compiles(self) -> None:
        blocks = readme_blocks("python")
        self.assertTrue(blocks)
        for block in blocks:
            compile(textwrap.dedent(block), "README.md", "exec")

    @unittest.skipUnless(YAML, "needs POPCON_TEST_PYTHON_YAML, a python with PyYAML")
    def test_yaml_in_it_is_valid_and_the_helm_values_hold_the_mapping(self) -> None:
        code = "import json, sys, yaml; print(json.dumps([yaml.safe_load(text) for text in json.load(sys.stdin)]))"

        def load(blocks: list[str]) -> list[Any]:
            ended = subprocess.run([YAML, "-c", code], input=json.dumps(blocks), capture_output=True, text=True)
            self.assertEqual((ended.returncode, ended.stderr), (0, ""))
            return json.loads(ended.stdout)  # type: ignore[no-any-return]

        values = load(readme_blocks("yaml"))
        (mapping,) = (value for value in values if "mappings" in value)
        for value in values:
            if "statsd" in value:
                self.assertEqual(load([value["statsd"]["mappingConfig"]]), [mapping])
        self.assertGreaterEqual(len(values), 3)


if __name__ == "__main__":
    unittest.main()
