"""The tests of popcon: `python -m unittest`.

Those that need a real server, Debian's Python or a large environment are told where by
POPCON_TEST_* variables, as .ci/run sets them, and are skipped without.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.machinery
import importlib.util
import io
import json
import os
import py_compile
import random
import re
import shlex
import shutil
import socket
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import popcon

popcon.load_command_line()
command_line: Any = popcon  # with what it has since then

HERE = Path(__file__).resolve().parent
SOURCE = Path(popcon.__file__).resolve()
EXPORTER = os.environ.get("POPCON_TEST_STATSD_EXPORTER", "")
STATSD = os.environ.get("POPCON_TEST_STATSD", "")
LARGE = os.environ.get("POPCON_TEST_LARGE", "")
PROMETHEUS = os.environ.get("POPCON_TEST_PROMETHEUS", "")
JUPYTER = os.environ.get("POPCON_TEST_JUPYTER", LARGE)
DEBIAN = list(filter(None, os.environ.get("POPCON_TEST_DEBIAN", "").split(":")))
YAML = os.environ.get("POPCON_TEST_PYTHON_YAML", "")


def clean_environ(**settings: str) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DO_NOT"))}
    return environ | {"PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"} | settings


class Server:
    """A statsd server that only listens."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((address, 0))
        self.address, self.port = address, self.socket.getsockname()[1]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()

    @property
    def settings(self) -> dict[str, Any]:
        return {"PYTHON_POPCONTEST_STATSD_HOST": self.address, "PYTHON_POPCONTEST_STATSD_PORT": str(self.port)}

    def received(self, wait: float = 0.0) -> list[bytes]:
        """What came since the last call; loopback delivers before the sender goes on."""
        datagrams = []
        self.socket.settimeout(wait)
        with contextlib.suppress(BlockingIOError, TimeoutError):
            while True:
                datagrams.append(self.socket.recv(65536))
        return datagrams

    def names(self, wait: float = 0.0) -> list[str]:
        """The libraries that were counted since the last call, in order, each as often as it was."""
        lines = [line for datagram in self.received(wait) for line in datagram.decode().split("\n")]
        for line in lines:
            assert re.fullmatch(r"python_popcon\.library_used\.[a-z0-9-]+:1\|c", line), line
        return sorted(line[len("python_popcon.library_used.") : -len(":1|c")] for line in lines)

    def silences(self) -> str:
        """Code after which popcon takes this server, which never answers, for the name server."""
        return textwrap.dedent(f"""
            import popcon
            popcon.NAME_SERVER_PORT = {self.port}
            read, files = popcon._read, {{"/etc/resolv.conf": b"nameserver {self.address}", "/etc/hosts": b""}}
            popcon._read = lambda path, *size: files.get(path) or read(path, *size)
            """)


class Case(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(self.enterContext_(tempfile.TemporaryDirectory())).resolve()
        self.site = self.folder / "lib" / "site-packages"
        self.site.mkdir(parents=True)
        self.own = self.folder / "own"
        self.own.mkdir()

    def enterContext_(self, manager: Any) -> Any:  # TestCase.enterContext came with 3.11
        value = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return value

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
        """Install a library of these files as pip does; record=None leaves the RECORD out."""
        folder = folder or self.site
        self.write(folder, dict.fromkeys(files, source))
        info = info or f"{re.sub('[-.]+', '_', name)}-1.0.dist-info"
        meta = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\nText\nName: not-me\n"}
        meta |= {f"{info}/{path}": text for path, text in (more or {}).items()}
        self.write(folder, meta)
        if record == "":
            record = "".join(f"{path},sha256=abc,1\n" for path in [*meta, *files]) + f"{info}/RECORD,,\n"
        if record is not None:
            self.write(folder, {f"{info}/RECORD": record})
        return folder / info

    def write(self, folder: Path, files: dict[str, str]) -> None:
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")

    def owners(self, *modules: str, folder: Path | None = None) -> set[str]:
        """What popcon says of modules, named by their paths in the folder."""
        folder = folder or self.site
        files = {}
        for path in modules:
            name = path.partition(".")[0].replace("/", ".")
            files[str(folder / path)] = name.removesuffix(".__init__")
        return popcon.libraries(files)[0]

    def run_python(
        self, code: str, *flags: str, cwd: Path | None = None, script: str = "", **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the code in a fresh interpreter that finds self.site."""
        path = os.pathsep.join([str(self.site), str(HERE)])
        arguments = [sys.executable, *flags] + ([script] if script else ["-c", textwrap.dedent(code)])
        return subprocess.run(
            arguments,
            env=clean_environ(**{"PYTHONPATH": path} | settings),
            cwd=cwd or self.own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def used(self, code: str, *flags: str, before: str = "", **options: Any) -> set[str]:
        """The libraries that a fresh interpreter names after it ran the code."""
        result = self.run_python(
            f"""
import sys
{textwrap.dedent(before)}
import popcon
popcon.setup_reporter()
{textwrap.dedent(code)}
print(*sorted(popcon.used_libraries()), sep=" ", end="")
""",
            *flags,
            **options,
        )
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        return set(result.stdout.split())

    def sent(self, code: str, *flags: str, **options: Any) -> tuple[set[str], subprocess.CompletedProcess[str]]:
        """The libraries that a fresh interpreter sends when it ends, and how it ended."""
        with Server() as server:
            result = self.run_python(
                "import popcon; popcon.setup_reporter()\n" + textwrap.dedent(code), *flags, **server.settings | options
            )
            names = server.names()
        self.assertEqual(len(names), len(set(names)))
        return set(names), result

    SESSIONS_ONLY = (
        "popcon: only IPython and Jupyter report here by themselves: what plain scripts import is not known\n"
    )

    def usage(self, *arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
        """Run `usage` as run_usage() does, and leave SESSIONS_ONLY out of what it said."""
        ended = self.run_usage(*arguments, **options)
        ended.stderr = ended.stderr.replace(self.SESSIONS_ONLY, "")
        return ended

    def run_usage(self, *arguments: str, before: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
        """Run `usage` where self.site holds all that is installed."""
        path = os.pathsep.join([str(self.site), str(HERE)])
        program = ["-c", f"{before}; import sys, popcon; sys.exit(popcon.main())"] if before else ["-m", "popcon"]
        return subprocess.run(
            [sys.executable, "-S", *program, "usage", *arguments],
            env=clean_environ(**{"PYTHONPATH": path, "NO_PROXY": "*", "PYTHONUTF8": "1"} | settings),
            cwd=self.own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=60,
        )

    @contextlib.contextmanager
    def exporter(self, mapping: str, place: tuple[int, int] = (0, 0)) -> Iterator[tuple[dict[str, Any], Any]]:
        """The real statsd_exporter: the settings for it, and a function that gives its metrics.

        Takes the ports for statsd and for the metrics, if it is to take another's place.
        """
        (self.folder / "mapping.yaml").write_text(mapping, encoding="utf-8")
        with Server() as server, socket.create_server(("127.0.0.1", 0)) as tcp:
            settings, port = server.settings, place[1] or tcp.getsockname()[1]
        settings |= {"PYTHON_POPCONTEST_STATSD_PORT": str(place[0])} if place[0] else {}
        process = subprocess.Popen(
            [
                EXPORTER,
                f"--statsd.mapping-config={self.folder / 'mapping.yaml'}",
                f"--statsd.listen-udp=127.0.0.1:{settings['PYTHON_POPCONTEST_STATSD_PORT']}",
                "--statsd.listen-tcp=",
                "--statsd.read-buffer=4194304",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=subprocess.DEVNULL,
        )

        url = f"http://127.0.0.1:{port}/metrics"

        def metrics() -> dict[str, float]:
            with urllib.request.urlopen(url, timeout=5) as answer:
                lines = answer.read().decode().splitlines()
            return {
                line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")
            }

        metrics.url = url  # type: ignore[attr-defined]
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


class TestWhatCounts(Case):
    def test_a_package_a_single_file_and_an_extension_count(self) -> None:
        self.install("Alpha", "alpha/__init__.py", "alpha/part.py")
        self.install("beta", "beta.py")
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        self.install("cffi-like", f"_cffi_like{suffix}")
        self.install("unused", "unused.py")
        self.assertEqual(self.used("import alpha.part, beta"), {"alpha", "beta"})
        self.assertEqual(self.owners(f"_cffi_like{suffix}"), {"cffi-like"})

    def test_names_are_normalised_as_pep_503_says(self) -> None:
        for name, expected in [
            ("ruamel.yaml", "ruamel-yaml"),
            ("A__b-.c", "a-b-c"),
            ("PyYAML", "pyyaml"),
            ("x", "x"),
            ("2to3", "2to3"),
            ("", ""),
            ("a b", ""),
            ("a:1|c\nb", ""),
            ("é", ""),
            ("\u212aafka", ""),
            ("-", ""),
            ("a/b", ""),
            ("²", ""),
        ]:
            with self.subTest(name=name):
                self.assertEqual(popcon.normalized(name), expected)

    def test_only_the_library_whose_file_was_imported_counts_in_a_namespace(self) -> None:
        self.install("google-cloud-storage", "google/cloud/storage/__init__.py")
        self.install("google-cloud-bigquery", "google/cloud/bigquery/__init__.py")
        self.install("google-auth", "google/auth/__init__.py")
        self.assertEqual(self.used("import google.cloud.storage"), {"google-cloud-storage"})

    def test_a_library_within_anothers_package_counts_for_itself(self) -> None:
        self.install("host", "host/__init__.py")
        self.install("guest", "host/plugins/guest.py", "guest_tool.py")
        self.assertEqual(self.used("import host"), {"host"})
        self.assertEqual(self.used("import host.plugins.guest"), {"host", "guest"})

    def test_every_library_that_lists_the_file_counts(self) -> None:
        self.install("opencv-python", "cv2/__init__.py")
        self.install("opencv-python-headless", "cv2/__init__.py")
        self.assertEqual(self.used("import cv2"), {"opencv-python", "opencv-python-headless"})

    def test_a_library_in_the_baseline_never_counts(self) -> None:
        self.install("alpha", "alpha/__init__.py", "alpha/late.py")
        self.install("beta", "beta.py")
        self.assertEqual(self.used("import alpha.late, beta", before="import alpha"), {"beta"})

    def test_a_later_setup_moves_the_baseline(self) -> None:
        self.install("alpha", "alpha.py")
        self.install("beta", "beta.py")
        names, result = self.sent("import alpha; popcon.setup_reporter(); import beta")
        self.assertEqual((names, result.stderr), ({"beta"}, ""))

    def test_without_a_setup_all_that_is_loaded_counts(self) -> None:
        self.install("alpha", "alpha.py")
        self.assertEqual(
            self.run_python("import alpha, popcon; print('alpha' in popcon.used_libraries())").stdout, "True\n"
        )

    def test_the_standard_library_never_counts(self) -> None:
        self.assertEqual(self.used("import json, csv, decimal, sqlite3, xml.dom.minidom, concurrent.futures"), set())

    def test_own_modules_that_bear_a_librarys_name_never_count(self) -> None:
        self.install("utils", "utils.py", "numpy/__init__.py")
        self.write(self.own, {"utils.py": "", "numpy/__init__.py": ""})
        self.assertEqual(self.used("sys.path.insert(0, ''); import utils, numpy"), set())

    def test_a_file_dropped_beside_the_libraries_is_nobodys(self) -> None:
        self.install("alpha", "alpha/__init__.py")
        self.write(self.site, {"dropped.py": "", "alpha/dropped.py": ""})
        self.assertEqual(self.used("import dropped"), set())

    def test_source_trees_never_count(self) -> None:
        for meta in ("mine.egg-info/PKG-INFO", "mine-1.0.dist-info/METADATA"):
            self.write(
                self.own, {"mine.py": "", meta: "Name: mine\n", str(Path(meta).parent / "top_level.txt"): "mine\n"}
            )
        self.assertEqual(self.used("sys.path.insert(0, ''); import mine"), set())

    def test_editable_installs_never_count(self) -> None:
        editable = {"direct_url.json": json.dumps({"url": "file:///home/me/mine", "dir_info": {"editable": True}})}
        self.install("mine", "__editable___mine_finder.py", more=editable)
        self.install("broken", "broken.py", more={"direct_url.json": '{ "dir_info" :\n{ "editable" : true'})
        self.install(
            "copied", "copied.py", more={"direct_url.json": json.dumps({"url": "file:///home/me", "dir_info": {}})}
        )
        self.write(self.own, {"mine.py": ""})
        self.assertEqual(
            self.used(f"sys.path.insert(0, {str(self.own)!r}); import __editable___mine_finder, mine, broken, copied"),
            {"copied"},
        )

    def test_lazy_modules_do_not_count_until_touched_and_stay_asleep(self) -> None:
        self.install("sleepy", "sleepy.py", source="value = 1; print('woken')")
        lazily = """
            import importlib.util
            spec = importlib.util.find_spec("sleepy")
            spec.loader = importlib.util.LazyLoader(spec.loader)
            sleepy = sys.modules["sleepy"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sleepy)
            """
        self.assertEqual(self.used(lazily), set())
        self.assertEqual(self.used(textwrap.dedent(lazily) + "sleepy.value"), {"woken", "sleepy"})
        self.assertEqual(self.used("sleepy.value", before=lazily), {"woken", "sleepy"})

    def test_a_module_run_with_m_counts_and_a_script_does_not(self) -> None:
        self.install("tool", "tool.py", source="import popcon; print(popcon.used_libraries() & {'tool'})")
        self.write(self.own, {"script.py": "import popcon; print(popcon.used_libraries() & {'tool'})"})
        arguments: dict[str, Any] = {
            "env": clean_environ(PYTHONPATH=f"{self.site}{os.pathsep}{HERE}"),
            "cwd": self.own,
            "text": True,
        }
        self.assertEqual(subprocess.check_output([sys.executable, "-m", "tool"], **arguments), "{'tool'}\n")
        self.assertEqual(subprocess.check_output([sys.executable, "script.py"], **arguments), "set()\n")

    @unittest.skipUnless(hasattr(os, "fork"), "needs os.fork")
    def test_a_forked_child_counts_only_what_it_imported_itself(self) -> None:
        for name in ("alpha", "beta"):
            self.install(name, f"{name}.py")
        with Server() as server:
            result = self.run_python(
                """
                import popcon; popcon.setup_reporter()
                import alpha, os, sys
                children = [os.fork() or sys.exit(__import__("beta") and 0) for _ in range(3)]
                for child in children:
                    os.waitpid(child, 0)
                """,
                **server.settings,
            )
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            prefix = b"python_popcon.library_used."
            self.assertEqual(sorted(server.received()), [prefix + b"alpha:1|c"] + 3 * [prefix + b"beta:1|c"])

    def test_an_alias_in_sys_modules_and_a_rewritten_file_do_not_mislead(self) -> None:
        self.install("alpha", "alpha/__init__.py")
        self.install("beta", "beta.py")
        self.assertEqual(
            self.used("import alpha; sys.modules['x.y.z'] = alpha; alpha.__file__ = '/x/beta.py'"), {"alpha"}
        )
        self.assertEqual(
            self.used("import alpha, importlib.util; alpha.__spec__ = importlib.util.find_spec('beta')"), {"alpha"}
        )
        self.assertEqual(self.used("import alpha; del alpha.__spec__"), {"alpha"})
        self.assertEqual(self.used("import alpha; del alpha.__file__"), {"alpha"})
        self.assertEqual(self.used("import alpha; alpha.__file__ = alpha.__spec__.origin = 5"), set())

    def test_a_module_that_replaced_itself_by_an_object_counts(self) -> None:
        sources = {
            "item": "class Self:\n    def __getattr__(self, name): sys.exit('woken')\nitem = Self()",
            "module": "class Self(types.ModuleType):\n    def f(self): pass\nitem = Self('module')",
            "heir": "class Base:\n    def f(self): pass\nclass Self(Base): pass\nitem = Self()",
            "value": "class Self:\n    @property\n    def f(self): sys.exit('woken')\nitem = Self()",
            "unbound": "class Self:\n    @staticmethod\n    def f(): pass\nitem = Self()",
            "function": "def item(): pass",
            "kind": "class item:\n    @classmethod\n    def f(self): pass",
            "mapping": "class Self(dict):\n    def __init__(self): self.__dict__ = self\nitem = Self()",
            "filed": "class Self:\n    def f(self): pass\nitem = Self()\nitem.__file__ = types",
        }
        for name, source in sources.items():
            self.install(name, f"{name}.py", source=f"import sys, types\n{source}\nsys.modules[__name__] = item")
        self.assertEqual(self.used(f"import {', '.join(sources)}"), sources.keys())

    def test_a_module_made_of_a_file_that_was_not_executed_does_not_count_nor_hide(self) -> None:
        self.install("first", "shared/__init__.py", "shared/first.py")
        self.install("second", "shared/second.py")
        # So do the *-nspkg.pth files that setuptools has written for namespace packages.
        made = """
            import importlib.machinery, importlib.util, types
            spec = importlib.machinery.PathFinder.find_spec("shared")
            shared = sys.modules.setdefault("shared", importlib.util.module_from_spec(spec))
            """
        self.assertEqual(self.used("import shared.second", before=made), {"second"})
        self.assertEqual(self.used("import shared.first", before=made), {"first"})
        self.assertEqual(self.used(textwrap.dedent(made) + "import shared.second"), {"second"})
        odd = "\nclass Odd(types.ModuleType): pass\nsys.modules[__name__] = Odd(__name__)"
        self.install(
            "odd", "shared/odd.py", source=f"import sys, types{odd}\nsys.modules[__name__].__spec__ = __spec__"
        )
        self.assertEqual(self.used("import shared.odd", before=made), {"odd"})
        # What import has executed has been executed, whatever the module made of itself.
        for number, source in enumerate(
            [
                "del __builtins__",
                "new.__getattr__ = len",
                "new.sys = sys",
                "new.f = 1",
                "new.__version__ = '1'",
                "new.__file__ = __file__",
            ]
        ):
            renewed = "import sys, types\nnew = types.ModuleType(__name__)\nnew.__spec__ = __spec__\nsys.modules[__name__] = new\n"
            self.install(f"new{number}", f"new{number}.py", source=source if "del" in source else renewed + source)
            self.assertEqual(self.used(f"import new{number}"), {f"new{number}"})

    def test_what_is_no_module_costs_nobody_a_count_and_is_never_run(self) -> None:
        self.install("alpha", "alpha.py")
        self.install("numpy", "numpy/__init__.py")
        self.assertEqual(
            self.used("""
            import types, importlib.machinery
            def boom(*ignored): print("executed"); raise SystemExit(3)
            class Evil:
                __getattribute__ = __eq__ = __ne__ = __hash__ = __str__ = __repr__ = __bool__ = __len__ = __iter__ = boom
                __fspath__ = __dir__ = __call__ = startswith = boom
            class EvilModule(types.ModuleType):
                __getattribute__ = __getattr__ = __eq__ = __hash__ = boom
            class EvilMeta(type):
                __getattribute__ = __eq__ = __hash__ = boom
            class EvilDict(dict):
                get = values = items = keys = __iter__ = __len__ = __getitem__ = __contains__ = boom
            class Held:
                __dict__ = property(boom)
            held = type("Held", (), {})()
            held.__dict__ = EvilDict()
            class EvilSpec(importlib.machinery.ModuleSpec):
                __getattribute__ = boom
            liar = types.ModuleType("liar")
            liar.__spec__ = liar.__path__ = liar.__loader__ = liar.__package__ = liar.__file__ = Evil()
            named = types.ModuleType("named")
            named.__spec__ = importlib.machinery.ModuleSpec("named", None)
            named.__spec__.name = named.__spec__.origin = Evil(); named.__spec__.has_location = True
            specced = types.ModuleType("specced")
            specced.__spec__ = EvilSpec("specced", None)
            empty = types.ModuleType.__new__(types.ModuleType)
            sys.modules.update(nothing=None, evil=Evil(), module=EvilModule("numpy"), meta=EvilMeta("numpy", (), {})(), kind=EvilMeta("numpy", (), {}), held=held, hidden=Held(), number=5, text="numpy",
                               liar=liar, named=named, specced=specced, empty=empty, numpy=types.ModuleType("numpy"))
            sys.modules[7] = sys.modules[("numpy",)] = sys.modules[None] = sys
            import alpha
            """),
            {"alpha"},
        )

    def test_sys_path_may_hold_anything_or_nothing(self) -> None:
        self.install("alpha", "alpha/__init__.py")
        self.assertEqual(
            self.used("import alpha; sys.path[:] = [None, 5, b'x', '', '/nowhere', '/', 'relative', '\\0']"), {"alpha"}
        )
        self.assertEqual(self.used("import alpha; sys.path = None"), {"alpha"})

    def test_a_file_that_is_none_costs_nobody_a_count_and_asks_nobody(self) -> None:
        self.install("alpha", "alpha.py")
        for file in (
            "<string>",
            "odd",
            "alpha.py",
            "\0/x.py",
            "/tmp/\ud800/x.py",
            f"{self.site}/\ud800.py",
            "/dev/null/x.py",
        ):
            with self.subTest(file=file):
                self.assertEqual(
                    self.used(f"""
                        import types, importlib.metadata, alpha
                        importlib.metadata.packages_distributions = importlib.metadata.distributions = print
                        sys.modules["odd"] = types.ModuleType("odd")
                        sys.modules["odd"].__file__ = {file!r}
                        """),
                    {"alpha"},
                )

    @unittest.skipUnless(hasattr(os, "mkfifo"), "needs os.mkfifo")
    def test_bytecode_in_place_of_sources_counts(self) -> None:
        for name in ("alpha", "beta"):
            self.install(name, f"{name}.py", f"{name}_more/__init__.py")
        for path in list(self.site.rglob("*.py")):
            py_compile.compile(str(path), str(path) + "c", doraise=True)
            path.unlink()
        self.assertEqual(self.used("import alpha, beta_more"), {"alpha", "beta"})

    def test_an_own_module_with_which_the_standard_librarys_fail_costs_no_count(self) -> None:
        self.install("alpha", "alpha.py")
        for name in ("enum", "functools", "copyreg"):
            self.write(self.own, {f"{name}.py": ""})
            self.assertEqual(self.used(f"sys.path.insert(0, {str(self.own)!r}); import {name}, alpha"), {"alpha"})
            (self.own / f"{name}.py").unlink()

    def test_a_pipe_for_an_archive_does_not_block(self) -> None:
        self.install("alpha", "alpha.py")
        os.mkfifo(self.folder / "pipe")
        code = f"import types, alpha; odd = sys.modules['odd'] = types.ModuleType('odd'); odd.__file__ = {str(self.folder / 'pipe' / 'odd.py')!r}"
        self.assertEqual(self.used(code), {"alpha"})

    def test_a_file_from_a_loader_of_ones_own_is_a_file_like_others(self) -> None:
        self.install("tools", "tools/_distutils.py")
        code = """
            import importlib.abc, importlib.machinery, importlib.metadata, types
            importlib.metadata.packages_distributions = importlib.metadata.distributions = print
            class Loader(importlib.abc.Loader): pass
            import tools._distutils as module
            module.__spec__ = importlib.machinery.ModuleSpec("distutils", Loader())
            sys.modules["distutils"] = module
            del sys.modules["tools"], sys.modules["tools._distutils"]
            """
        self.assertEqual(self.used(code), {"tools"})

    def test_modules_of_a_folder_that_a_pth_file_put_on_sys_path_count(self) -> None:
        self.install("pywin32", "win32/lib/win32con.py")
        self.assertEqual(
            self.used(f"sys.path.append({str(self.site / 'win32' / 'lib')!r}); import win32con"), {"pywin32"}
        )

    def test_metadata_that_a_library_brings_along_names_nobody_else(self) -> None:
        inner = self.site / "tools" / "_vendor"
        self.install("vendored", "vendored/__init__.py", folder=inner)
        old = self.install("old", "old.py", folder=inner, info="old.egg-info")
        (old / "METADATA").rename(old / "PKG-INFO")
        files = ["vendored/__init__.py", "old.py", "vendored-1.0.dist-info/METADATA", "old.egg-info/PKG-INFO"]
        self.install("tools", record="".join(f"tools/_vendor/{file},,\n" for file in files))
        self.install("added", "added.py", folder=inner)  # by pip install --target
        code = f"sys.path.append({str(inner)!r}); import "
        self.assertEqual(self.used(code + "vendored"), {"tools"})
        self.assertEqual(self.used(code + "old"), {"tools"})
        self.assertEqual(self.used(code + "added"), {"added"})
        self.assertEqual(self.used(code + "vendored, old, added"), {"tools", "added"})
        self.install("vendored", "elsewhere.py")
        self.assertEqual(self.used(code + "vendored, elsewhere"), {"tools", "vendored"})
        self.install("more", "more.py", folder=inner)  # in an overlay of the same version
        with open(self.site / "tools-1.0.dist-info" / "RECORD", "a", encoding="utf-8") as record:
            record.write("tools/_vendor/more-1.0.dist-info/METADATA,,\n")
        self.assertEqual(self.used(code + "more"), {"tools"})
        # A name proves nothing of what lies within.
        self.install("plug", "plug.py", folder=self.site / "bare" / "plugins")
        self.install("bare", "bare/__init__.py", record=None, info="bare-1.0.egg-info")
        self.assertLessEqual(
            {"plug"}, self.used(f"sys.path.append({str(self.site / 'bare' / 'plugins')!r}); import plug")
        )

    def test_several_folders_each_with_its_metadata(self) -> None:
        target = self.folder / "target"
        self.install("alpha", "alpha.py", folder=target)
        self.install("beta", "beta.py")
        self.install("alpha-two", "alpha.py")
        self.assertEqual(
            self.used("import alpha, beta", PYTHONPATH=os.pathsep.join(map(str, [target, self.site, HERE]))),
            {"alpha", "beta"},
        )
        self.assertEqual(self.used(f"sys.path.insert(0, {str(target)!r}); import alpha; del sys.path[0]"), {"alpha"})


class TestMetadata(Case):
    def test_record_need_not_be_sorted_nor_end_in_a_newline(self) -> None:
        self.install(
            "alpha",
            "zzz.py",
            "alpha/a.py",
            "alpha/__init__.py",
            record="zzz.py,,\nalpha/a.py,,\nb/c.py,,\nalpha/__init__.py,,",
        )
        for module in ("zzz.py", "alpha/a.py", "alpha/__init__.py"):
            self.assertEqual(self.owners(module), {"alpha"})
        self.assertEqual(self.owners("alpha/b.py", "a.py", "c.py"), set())

    def test_a_name_that_begins_like_another_is_another(self) -> None:
        self.install("alpha", record="a/b.pyi,,\na/b.py.bak,,\na/b.py#,,\na/bb.py,,\naa/b.py,,\nx/a/b.py,,\n")
        self.assertEqual(self.owners("a/b.py"), set())

    def test_record_is_read_as_csv(self) -> None:
        for record in (
            '"a/b.py","sha256=x","1"\n',
            "a/b.py\n",
            "a/b.py",
            '"c,d.txt",sha256=x,1\na/b.py,sha256=y,2\n',
            "a/b.py,,\r\nc.py,,\r\n",
            "c.py,,\r\na/b.py,,\r\n",
            '"q""uoted",,\na/b.py,,\n',
            "c.py\na/b.py\n",
        ):
            with self.subTest(record=record):
                shutil.rmtree(self.site)
                self.install("alpha", record=record)
                self.assertEqual(self.owners("a/b.py"), {"alpha"})
                self.assertEqual(self.owners("b.py", "d.txt"), set())
        for record in ("a.py", "c.py\na.py\n", "a.py\r\nc.py\r\n", '"a.py"\n'):
            with self.subTest(record=record):
                shutil.rmtree(self.site)
                self.install("alpha", record=record)
                self.assertEqual(self.owners("a.py"), {"alpha"})

    def test_a_quoted_comma_gives_no_path(self) -> None:
        self.install("alpha", record='"x,a.py",,\n"a.py,x",,\nb.py,,\n')
        self.assertEqual(self.owners("a.py"), set())
        self.assertEqual(self.owners("b.py"), {"alpha"})

    def test_rubbish_costs_only_the_distribution_it_is_in(self) -> None:
        self.install("good", "good.py")
        rubbish: list[dict[str, bytes]] = [
            {"RECORD": bytes(range(256)) * 99, "METADATA": bytes(range(256))},
            {"RECORD": b"good.py,,\n"},
            {"METADATA": b"Name: x\n"},
            {"RECORD": b"good.py,,\n", "METADATA": b""},
            {"RECORD": b"good.py,,\n", "METADATA": b"Version: 1\n\nName: x\n"},
            {"RECORD": b"good.py,,\n", "METADATA": b"Name: evil:1|c\nevil\n"},
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
        (self.site / ".dist-info").mkdir()
        (self.site / "Ünïcode-1.dist-info").mkdir()
        (self.site / "folder-1.dist-info" / "RECORD").mkdir(parents=True)
        (self.site / "loop-1.dist-info").symlink_to(self.site / "loop-1.dist-info")
        (self.site / "zero-1.dist-info").mkdir()
        (self.site / "zero-1.dist-info" / "RECORD").symlink_to("/dev/zero")
        self.assertEqual(self.owners("good.py"), {"good"})

    @unittest.skipUnless(hasattr(os, "mkfifo"), "needs os.mkfifo")
    def test_a_pipe_for_a_record_does_not_block(self) -> None:
        self.install("good", "good.py")
        (self.site / "pipe-1.dist-info").mkdir()
        os.mkfifo(self.site / "pipe-1.dist-info" / "RECORD")
        self.assertEqual(self.owners("good.py"), {"good"})

    def test_the_name_is_the_metadatas_not_the_folders(self) -> None:
        self.install("Real.Name", "alpha.py", info="other-1.0.dist-info")
        self.assertEqual(self.owners("alpha.py"), {"real-name"})

    def test_fuzzed_records_agree_with_a_plain_reading(self) -> None:
        draw = random.Random(1)
        names = ["a", "b", "a-b", "a_b", "aa", "B", "_a", "é"]
        for round_ in range(150):
            shutil.rmtree(self.site)
            self.site.mkdir()
            expected, universe = {}, {"/".join(draw.choices(names, k=draw.randint(1, 3))) + ".py" for _ in range(30)}
            for library in range(draw.randint(1, 6)):
                files = draw.sample(sorted(universe), draw.randint(0, 8))
                out = io.StringIO()
                csv.writer(
                    out,
                    lineterminator=draw.choice(["\n", "\r\n"]),
                    quoting=draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
                ).writerows(
                    [file, draw.choice(["", "sha256=a-_"]), draw.choice(["", "1"])]
                    for file in [*files, f"lib{library}/RECORD"]
                )
                self.install(f"lib{library}", record=out.getvalue())
                expected[f"lib{library}"] = set(files)
            wanted = draw.sample(sorted(universe), draw.randint(1, 10))
            files_ = {str(self.site / path): path[:-3].replace("/", ".") for path in wanted}
            with self.subTest(round=round_):
                self.assertEqual(
                    popcon.libraries(files_)[0], {name for name, files in expected.items() if set(wanted) & files}
                )


class TestWithoutRecord(Case):
    def test_top_level_txt_decides_else_the_librarys_own_name(self) -> None:
        self.install("PyYAML", record=None, more={"top_level.txt": "_yaml\nyaml\n"})
        self.install("six", record=None)
        self.install("typing-extensions", record=None)
        self.write(
            self.site,
            {"old-1.0.egg-info": "Metadata-Version: 1.0\nName: old\n", "eggy.egg-info/PKG-INFO": "Name: eggy\n"},
        )
        for module, owner in [
            ("yaml/__init__.py", "pyyaml"),
            ("_yaml/__init__.py", "pyyaml"),
            ("six.py", "six"),
            ("old/__init__.py", "old"),
            ("typing_extensions.py", "typing-extensions"),
            ("eggy/__init__.py", "eggy"),
        ]:
            self.assertEqual(self.owners(module), {owner})
        self.assertEqual(self.owners("sixer.py", "dropped.py", "yam.py"), set())

    def test_in_a_shared_package_the_own_name_leads_to_the_file(self) -> None:
        for name in ("azure-storage-blob", "azure-core", "azure-mgmt-core"):
            self.install(name, record=None, more={"top_level.txt": "azure\n"})
        self.install("google-auth", record=None)
        self.assertEqual(self.owners("azure/storage/blob/__init__.py"), {"azure-storage-blob"})
        self.assertEqual(self.owners("azure/core/x.py"), {"azure-core"})
        self.assertEqual(self.owners("google/auth/x.py"), {"google-auth"})
        self.assertEqual(self.owners("azure/other.py"), {"azure-storage-blob", "azure-core", "azure-mgmt-core"})
        for name in ("protobuf", "googleapis-common-protos"):
            self.install(name, record=None, more={"top_level.txt": "google\n"})
        self.assertEqual(self.owners("google/protobuf/__init__.py"), {"protobuf"})

    def test_an_own_name_is_not_the_beginning_of_another(self) -> None:
        self.install("rich", record=None)
        self.install("tomli", record=None)
        self.install("tomli-w", record=None)
        self.assertEqual(self.owners("rich_private.py", "tomli_w/__init__.py"), {"tomli-w"})

    def test_what_a_record_lists_is_not_claimed_by_name(self) -> None:
        self.install("azure-storage-blob", "azure/storage/blob.py")
        self.install("azure-other", record=None, more={"top_level.txt": "azure\n"})
        self.assertEqual(self.owners("azure/storage/blob.py"), {"azure-storage-blob"})
        self.assertEqual(self.owners("azure/storage/blob.py", "azure/x.py"), {"azure-storage-blob", "azure-other"})

    def test_names_decide_only_where_libraries_get_installed(self) -> None:
        self.install("mine", "mine.py", record=None, folder=self.own)
        self.assertEqual(self.owners("mine.py", folder=self.own), set())


class TestArchives(Case):
    def archive(self, path: Path, source: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for file in source.rglob("*"):
                archive.write(file, file.relative_to(source))

    def test_zipped_libraries_count_and_only_in_their_own_archive(self) -> None:
        self.install("alpha", "alpha/__init__.py")
        self.install("beta", "beta.py")
        self.archive(self.folder / "libs.zip", self.site)
        zipped = f"{self.folder / 'libs.zip'}{os.pathsep}{HERE}"
        self.assertEqual(self.used("import alpha", PYTHONPATH=zipped), {"alpha"})
        self.write(self.own / "app", {"beta.py": ""})
        self.archive(self.folder / "app.zip", self.own / "app")
        self.assertEqual(
            self.used("import beta", PYTHONPATH=f"{self.folder / 'app.zip'}{os.pathsep}{self.site}{os.pathsep}{HERE}"),
            set(),
        )

    def test_eggs_count_zipped_or_not(self) -> None:
        egg = self.folder / "egg"
        self.write(
            egg,
            {
                "gamma/__init__.py": "",
                "EGG-INFO/PKG-INFO": "Metadata-Version: 1.0\nName: Gamma.X\n",
                "EGG-INFO/top_level.txt": "gamma\n",
            },
        )
        self.archive(self.folder / "gamma-1.0-py3.egg", egg)
        egg.rename(self.folder / "gamma-2.0-py3.egg")
        for version in "12":
            path = f"{self.folder / f'gamma-{version}.0-py3.egg'}{os.pathsep}{HERE}"
            self.assertEqual(self.used("import gamma", PYTHONPATH=path), {"gamma-x"})

    def test_rubbish_in_an_archive_costs_only_itself(self) -> None:
        self.install("alpha", "alpha.py")
        self.install("beta", "beta.py", record="beta.py,x,notint,4,5\n")
        self.install("gamma", "gamma.py")
        (self.site / "delta-1.0.dist-info").mkdir()
        (self.site / "delta-1.0.dist-info" / "METADATA").write_bytes(b"Name: \xff\n")
        self.archive(self.folder / "libs.zip", self.site)
        own = self.folder / "site-packages"
        self.install("omega", "omega.py", folder=own)
        path = os.pathsep.join(map(str, [self.folder / "libs.zip", own, HERE]))
        self.assertEqual(self.used("import alpha, beta, gamma, omega", PYTHONPATH=path), {"alpha", "gamma", "omega"})

    def test_a_finder_of_ones_own_with_its_distributions_counts(self) -> None:
        self.install("clash", "virtual.py")
        finder = """
            import importlib.abc, importlib.machinery, importlib.metadata
            class Distribution(importlib.metadata.Distribution):
                def read_text(self, name): return {"METADATA": "Name: Vir.tual\\n\\n", "top_level.txt": "virtual\\n"}.get(name)
                def locate_file(self, path): return path
            class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
                def find_spec(self, name, path=None, target=None):
                    return importlib.machinery.ModuleSpec(name, self) if name in ("virtual", "mine") else None
                def exec_module(self, module): pass
                def find_distributions(self, context=None):
                    return [Distribution()] if context is None or context.name in (None, "Vir.tual", "vir-tual") else []
            sys.meta_path.insert(0, Finder())
            """
        self.assertEqual(self.used(textwrap.dedent(finder) + "import virtual"), {"vir-tual"})
        self.assertEqual(self.used(textwrap.dedent(finder) + "import mine"), set())


class TestSending(Case):
    def setUp(self) -> None:
        super().setUp()
        self.install("alpha", "alpha.py")
        self.install("beta", "beta.py")

    def test_the_very_bytes(self) -> None:
        with Server() as server:
            self.run_python("import popcon; popcon.setup_reporter(); import beta, alpha", **server.settings)
            self.assertEqual(
                server.received(), [b"python_popcon.library_used.alpha:1|c\npython_popcon.library_used.beta:1|c"]
            )

    def test_over_ipv6_and_by_name(self) -> None:
        try:
            server6 = Server("::1")
        except OSError:
            self.skipTest("needs IPv6 on the loopback interface")
        with server6:
            self.run_python("import popcon; popcon.setup_reporter(); import alpha", **server6.settings)
            self.assertEqual(len(server6.received()), 1)
        with Server() as server:
            self.run_python(
                "import popcon; popcon.setup_reporter(); import alpha",
                **server.settings | {"PYTHON_POPCONTEST_STATSD_HOST": "localhost"},
            )
            self.assertEqual(len(server.received()), 1)

    def test_datagrams_are_full_but_never_over_1232_bytes(self) -> None:
        lines = [popcon.statsd_line(f"library-{number}", "p" * (number % 50 + 1)) for number in range(500)]
        packed = popcon.datagrams(lines)
        self.assertEqual(b"\n".join(packed).split(b"\n"), lines)
        self.assertLessEqual(max(map(len, packed)), 1232)
        for datagram, following in zip(packed, packed[1:], strict=False):
            self.assertGreater(len(datagram) + 1 + len(following.partition(b"\n")[0]), 1232)
        self.assertEqual(popcon.datagrams([]), [])
        self.assertEqual(popcon.datagrams([b"x" * 1232, b"y"]), [b"x" * 1232, b"y"])

    def test_hundreds_of_libraries_all_arrive(self) -> None:
        for number in range(300):
            self.install(f"library-{number}", f"library_{number}.py")
        names, _ = self.sent("for n in range(300): __import__(f'library_{n}')")
        self.assertEqual(names, {f"library-{number}" for number in range(300)})

    def test_each_library_once_per_process(self) -> None:
        with Server() as server:
            result = self.run_python(
                """
                import popcon; popcon.setup_reporter()
                import alpha; print(popcon.report(), popcon.report())
                import beta; print(popcon.report(), sorted(popcon.used_libraries()))
                popcon.setup_reporter(); print(popcon.used_libraries())
                """,
                **server.settings,
            )
            self.assertEqual(result.stdout, "['alpha'] []\n['beta'] ['alpha', 'beta']\nset()\n")
            self.assertEqual(len(server.received()), 2)

    def test_the_sample_rate_draws_processes_and_is_told_to_the_server(self) -> None:
        with Server() as server:
            environ = server.settings | {"PYTHON_POPCONTEST_STATSD_SAMPLE_RATE": "0.5"}
            result = self.run_python(
                """
                import popcon, sys, alpha
                drawn = 0
                for n in range(1000):
                    reporter = popcon.Reporter()
                    reporter.update = lambda: None
                    reporter.used = {"alpha"}
                    first = reporter.report()
                    assert reporter.report() == []
                    drawn += first == ["alpha"]
                    if n % 100 == 0: sys.stdout.flush()
                print(drawn)
                """,
                **environ,
            )
            self.assertEqual(result.stderr, "")
            self.assertTrue(400 < int(result.stdout) < 600, result.stdout)
            self.assertEqual(set(server.received()), {b"python_popcon.library_used.alpha:1|c|@0.5"})

    def test_a_sample_rate_of_one_is_not_told(self) -> None:
        self.assertEqual(popcon.statsd_line("x", "p", "1.0"), b"p.x:1|c")
        self.assertEqual(popcon.statsd_line("x", "p", "0.10"), b"p.x:1|c|@0.10")

    def test_nothing_is_sent_without_a_host_or_under_do_not_track(self) -> None:
        for settings, reason in [
            ({"PYTHON_POPCONTEST_STATSD_HOST": ""}, "PYTHON_POPCONTEST_STATSD_HOST is not set"),
            ({"DO_NOT_TRACK": "1"}, "DO_NOT_TRACK"),
            ({"DO_NOT_TRACK": ""}, "DO_NOT_TRACK"),
            ({"DO_NOT_TRACK": "true"}, "DO_NOT_TRACK"),
        ]:
            with self.subTest(settings=settings):
                names, result = self.sent("import alpha", **settings)
                self.assertEqual((names, result.stdout, result.stderr, result.returncode), (set(), "", "", 0))
                names, result = self.sent("import alpha", PYTHON_POPCONTEST_DEBUG="1", **settings)
                self.assertEqual((names, len(result.stderr.splitlines())), (set(), 1))
                self.assertIn(reason, result.stderr)
        self.assertEqual(self.sent("import alpha", DO_NOT_TRACK="0")[0], {"alpha"})

    def test_what_was_loaded_under_do_not_track_is_not_sent_later(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            self.install(name, f"{name}.py")
        code = """
            import os, alpha
            popcon.report()
            os.environ["DO_NOT_TRACK"] = "1"
            import beta
            assert popcon.report() == []
            del os.environ["DO_NOT_TRACK"]
            import gamma
            """
        self.assertEqual(self.sent(code)[0], {"alpha", "gamma"})

    def test_a_wrong_setting_sends_nothing_and_says_what_is_right(self) -> None:
        wrong = {
            "HOST": ["a b", "http://x", "statsd:9125", "x\ny", "ü", "a..b", ".", ".a", "a" * 64 + ".b"],
            "PORT": ["0", "65536", "-1", "1.5", "x", "١", "9" * 5000, " 1"],
            "PREFIX": ["a b", "a:b", "a|c", "a\nb", "é", "a..b", ".a", "a.", "a/b", "x" * 1001],
            "SAMPLE_RATE": ["0", "1.1", "-1", "x", "nan", "1e-3", "0,5", "."],
        }
        for name, values in wrong.items():
            for value in values:
                setting = f"PYTHON_POPCONTEST_STATSD_{name}"
                with (
                    self.subTest(name=name, value=value[:9]),
                    mock.patch.dict(os.environ, {setting: value}),
                    self.assertRaisesRegex(ValueError, f"{name}=.*must be"),
                ):
                    popcon.setting(setting)
        names, result = self.sent("import alpha", PYTHON_POPCONTEST_STATSD_PREFIX="a b", PYTHON_POPCONTEST_DEBUG="1")
        self.assertEqual((names, result.returncode, len(result.stderr.splitlines())), (set(), 0, 1))
        self.assertIn("PYTHON_POPCONTEST_STATSD_PREFIX='a b': must be", result.stderr)

    def test_an_empty_setting_is_as_good_as_none(self) -> None:
        settings = {f"PYTHON_POPCONTEST_STATSD_{name}": "" for name in ("PREFIX", "SAMPLE_RATE")}
        self.assertEqual(self.sent("import alpha", **settings)[0], {"alpha"})

    def test_debug_says_what_was_sent(self) -> None:
        _, result = self.sent("import alpha", PYTHON_POPCONTEST_DEBUG="1")
        self.assertRegex(result.stderr, r"^popcon: sent python_popcon\.library_used\.alpha:1\|c to 127\.0\.0\.1:\d+\n$")
        _, result = self.sent("", PYTHON_POPCONTEST_DEBUG="1")
        self.assertEqual(result.stderr, "popcon: nothing sent: no library was used\n")
        self.assertEqual(self.sent("import alpha", PYTHON_POPCONTEST_DEBUG="0")[1].stderr, "")

    def test_a_server_that_is_not_there_is_not_felt(self) -> None:
        with Server() as gone:
            refused = gone.settings
        for settings in (
            refused,
            {"PYTHON_POPCONTEST_STATSD_HOST": "nowhere.invalid"},
            {"PYTHON_POPCONTEST_STATSD_HOST": "255.255.255.255"},
        ):
            with self.subTest(settings=settings):
                result = self.run_python(
                    "import popcon; popcon.setup_reporter(); import alpha; print(1); raise SystemExit(7)",
                    "-Wd",
                    "-Xdev",
                    **settings,
                )
                self.assertEqual((result.stdout, result.stderr, result.returncode), ("1\n", "", 7))
        result = self.run_python(
            "import popcon; popcon.setup_reporter(); import alpha",
            PYTHON_POPCONTEST_STATSD_HOST="nowhere.invalid",
            PYTHON_POPCONTEST_DEBUG="1",
        )
        self.assertEqual(len(result.stderr.splitlines()), 1)
        self.assertIn("popcon: nothing sent: ", result.stderr)

    def test_what_could_not_be_sent_is_sent_the_next_time(self) -> None:
        with Server() as server:
            result = self.run_python(
                """
                import popcon, os; popcon.setup_reporter(); import alpha
                host = os.environ.pop("PYTHON_POPCONTEST_STATSD_HOST")
                print(popcon.report())
                os.environ["PYTHON_POPCONTEST_STATSD_HOST"] = host
                """,
                **server.settings,
            )
            self.assertEqual((result.stdout, len(server.received())), ("[]\n", 1))

    def test_a_silent_name_server_delays_the_exit_by_a_second_at_most(self) -> None:
        with Server() as name_server:
            code = """
                import popcon, _socket, sys, time; popcon.setup_reporter(); import alpha
                getaddrinfo = _socket.getaddrinfo
                def silent(host, *arguments):
                    if not arguments[-1]:  # not numeric
                        time.sleep(30)
                    return getaddrinfo(host, *arguments)
                _socket.getaddrinfo = silent
                """
            settings: dict[str, Any] = {
                "PYTHON_POPCONTEST_STATSD_HOST": "statsd.example",
                "PYTHON_POPCONTEST_DEBUG": "1",
            }
            start = time.monotonic()
            result = self.run_python(textwrap.dedent(code) + name_server.silences(), **settings)
            self.assertLess(time.monotonic() - start, 10)
            self.assertEqual(
                result.stderr, "popcon: nothing sent: statsd.example: the name server did not answer within 1 s\n"
            )

    def test_a_name_server_that_answers_or_refuses_is_waited_for(self) -> None:
        with Server() as silent, mock.patch.object(popcon, "PATIENCE", 0.1):
            files = {
                "/etc/resolv.conf": b"# x\nsearch a b\nnameserver 127.0.0.1\nnameserver ::1\n",
                "/etc/hosts": b"127.0.0.1 localhost # x",
            }
            with (
                mock.patch.object(popcon, "_read", files.__getitem__),
                mock.patch.object(popcon, "NAME_SERVER_PORT", silent.port),
            ):
                self.assertFalse(popcon._name_server_answers("statsd.example."))
                (query,) = silent.received()
                self.assertEqual(query[2:], b"\1\0\0\1\0\0\0\0\0\0\6statsd\7example\0\0\1\0\1")
                self.assertTrue(popcon.addresses("localhost", 9125))
                self.assertEqual(silent.received(), [])
                silent.socket.close()
                self.assertTrue(popcon._name_server_answers("statsd.example"))
                files["/etc/resolv.conf"] = b""
                self.assertTrue(popcon._name_server_answers("statsd.example"))

    def test_the_name_server_is_asked_for_what_the_look_up_asks_first(self) -> None:
        cluster = "nameserver 127.0.0.1\nsearch jhub.svc.cluster.local svc.cluster.local\noptions ndots:5 timeout:1\n"
        inside, plain = b"\6statsd\3mon\4jhub\3svc\7cluster\5local\0", b"\6statsd\3mon\0"
        for host, text, expected in [
            ("statsd.mon", cluster, inside),
            ("statsd.mon.", cluster, plain),
            ("statsd.mon", cluster.replace("ndots:5", "rotate"), plain),
            ("statsd.mon", cluster.replace("ndots:5", "ndots:x"), plain),
            ("statsd.mon", cluster + "options rotate\n", inside),
            ("statsd.mon", cluster.replace("search jhub", "domain jhub"), inside),
            ("statsd.mon", cluster.replace("options", "search\noptions"), plain),
            ("statsd", cluster.replace("ndots:5", "rotate"), inside.replace(b"\3mon", b"")),
            ("statsd.mon", "search ..a.." + "b" * 70 + "\n" + cluster.replace("search", "#"), plain[:-1] + b"\1a\0"),
        ]:
            with self.subTest(host=host, text=text), Server() as silent, mock.patch.object(popcon, "PATIENCE", 0.1):
                files = {"/etc/resolv.conf": text.encode()}
                with (
                    mock.patch.object(popcon, "_read", files.__getitem__),
                    mock.patch.object(popcon, "NAME_SERVER_PORT", silent.port),
                ):
                    self.assertFalse(popcon._name_server_answers(host))
                (query,) = silent.received()
                self.assertEqual(query[12:], expected + b"\0\1\0\1")


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

    def test_no_start_pays_for_the_command_line(self) -> None:
        self.assertEqual(self.run_python("import popcon; print(hasattr(popcon, 'usage'))").stdout, "False\n")
        compiled = [compile(SOURCE.read_text(encoding="utf-8"), "popcon.py", "exec", optimize=0)]
        for code in compiled:  # which grows
            compiled += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        names = {code.co_name for code in compiled}
        self.assertIn("setup_reporter", names)
        self.assertNotIn("selftest", names)
        ended = self.run_python("import popcon; print(popcon.main(['uninstall']))", "-O")
        self.assertEqual((ended.returncode, ended.stderr), (0, ""))

    def test_a_process_that_used_no_library_reads_nothing_and_opens_no_socket(self) -> None:
        names, result = self.sent("""
            import json, csv, sys, os
            def hook(event, arguments):
                if event in ("open", "os.listdir", "os.scandir", "import", "socket.__new__", "socket.getaddrinfo", "subprocess.Popen", "os.fork"):
                    os.write(2, f"{event} {arguments}\\n".encode())
            sys.addaudithook(hook)
            """)
        self.assertEqual((names, result.stderr), (set(), ""))

    def test_a_persons_own_modules_are_never_run_by_us(self) -> None:
        self.install("alpha", "alpha.py")
        self.install("quoted", record='"quoted.py",,\n')
        shadows = [
            "csv",
            "email",
            "random",
            "socket",
            "bisect",
            "_bisect",
            "_socket",
            "json",
            "re",
            "enum",
            "selectors",
            "string",
            "sre_compile",
            "functools",
            "collections",
            "typing",
            "types",
            "operator",
            "copyreg",
            "_csv",
            "_json",
            "struct",
            "zipfile",
            "contextlib",
            "tempfile",
            "subprocess",
            "select",
        ]
        self.write(
            self.own,
            {
                f"{name}.py": "import os; os.write(1, b'executed'); import popcon; popcon.setup_reporter(); import alpha"
                for name in shadows
            },
        )
        code = f"import sys; sys.path.insert(0, {str(self.own)!r}); import alpha"
        names, result = self.sent(code)
        self.assertEqual((names, result.stdout, result.stderr), ({"alpha"}, "", ""))
        for script in ("csv.py", "random.py"):
            names, result = self.sent("", script=str(self.own / script))
            self.assertEqual((names, result.stdout, result.stderr), ({"alpha"}, "executed", ""))

    def test_a_persons_own_module_under_a_standard_name_is_not_used(self) -> None:
        self.write(self.own, {"csv.py": "def reader(*a): raise SystemExit('executed')"})
        self.install("quoted", record='"quoted.py",,\n')
        self.install("alpha", "alpha.py")
        names, result = self.sent(f"import sys; sys.path.insert(0, {str(self.own)!r}); import csv, alpha")
        self.assertEqual((names, result.stdout, result.stderr), ({"alpha"}, "", ""))

    def test_nothing_changes_the_process(self) -> None:
        self.install("alpha", "alpha.py")
        everything = {"alpha"}
        for what, code, flags, status, expected in [
            ("warnings are errors", "", ["-W", "error", "-bb", "-X", "dev"], 0, everything),
            ("no user site", "", ["-O", "-s"], 0, everything),
            ("an exit status", "raise SystemExit(7)", [], 7, everything),
            ("no stderr", "import sys; sys.stderr = sys.stdout = None", [], 0, everything),
            ("closed streams", "import os; os.close(0); os.close(1); os.close(2)", [], 0, everything),
            (
                "no working folder",
                "import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')",
                [],
                0,
                everything,
            ),
            ("sys.path emptied", "import sys; del sys.path[:]", [], 0, everything),
            ("sys.modules emptied", "import sys; sys.modules.clear()", [], 0, set()),
            ("meta_path emptied", "import sys; del sys.meta_path[:]", [], 0, None),
            ("environment emptied", "import os; os.environ.clear()", [], 0, set()),
            (
                "no descriptors left",
                "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))",
                [],
                0,
                set(),
            ),
            ("no memory for a thread", "import _thread; _thread.start_new_thread = None", [], 0, everything),
            ("optimised", "", ["-OO"], 0, everything),
            ("a random module is gone", "import sys; sys.modules['random'] = sys.modules['re'] = None", [], 0, None),
            (
                "a daemon thread that imports all the while",
                """
import sys, threading, types
def change():
    number = 0
    while True:
        number += 1
        sys.modules[f"m{number % 999}"] = types.ModuleType("m")
        sys.modules.pop(f"m{(number + 500) % 999}", None)
threading.Thread(target=change, daemon=True).start()
""",
                [],
                0,
                everything,
            ),
            (
                "Ctrl-C during the report",
                """
import signal, sys
sys.addaudithook(lambda event, arguments: event == "os.listdir" and signal.raise_signal(signal.SIGINT))
""",
                [],
                0,
                set(),
            ),
            (
                "a signal during the report",
                """
import signal, sys
signal.signal(signal.SIGALRM, lambda *ignored: None)
sys.addaudithook(lambda event, arguments: event == "os.listdir" and signal.raise_signal(signal.SIGALRM))
""",
                [],
                0,
                everything,
            ),
            ("an excepthook that fails", "import sys; sys.excepthook = sys.unraisablehook = 5", [], 0, everything),
            ("a stream that is none", "import sys; sys.stderr = 5", [], 120, everything),
            (
                "a trace function",
                "import sys; sys.settrace(lambda *a: 1 / 0 if a[1] == 'x' else None)",
                [],
                0,
                everything,
            ),
            ("a working folder of modules", "import os; os.chdir('/')", [], 0, everything),
            ("the clock is gone", "import time; del time.monotonic", [], 0, set()),
            (
                "an audit hook that forbids sockets",
                "import sys\ndef no(e, a):\n if e.startswith('socket'): raise RuntimeError(e)\nsys.addaudithook(no)",
                [],
                0,
                set(),
            ),
        ]:
            with self.subTest(what=what):
                names, result = self.sent("import alpha\n" + code, *flags)
                without = self.run_python("import alpha\n" + code, *flags)
                self.assertEqual((result.returncode, result.stdout, result.stderr), (without.returncode, "", ""))
                self.assertEqual(without.returncode, status)
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
                self.assertEqual(server.received(), [b"python_popcon.library_used.alpha:1|c"])

    def test_a_traceback_stays_as_it_is(self) -> None:
        self.install("alpha", "alpha.py")
        with_us = self.sent("import alpha\nraise ValueError('mine')")
        without = self.run_python("\nimport alpha\nraise ValueError('mine')")
        self.assertEqual(
            (with_us[0], with_us[1].returncode, with_us[1].stderr), ({"alpha"}, without.returncode, without.stderr)
        )

    def test_the_exit_takes_less_than_ten_megabytes(self) -> None:
        for number in range(400):
            self.install(
                f"library-{number}",
                record="".join(f"library_{number}/module_{n}.py,sha256={'x' * 43},123\n" for n in range(200)),
            )
        self.install("alpha", "alpha.py")
        result = self.run_python(
            """
            import popcon, tracemalloc; popcon.setup_reporter(); import alpha
            import re, csv, json  # the process's own
            tracemalloc.start(); popcon.report(); print(tracemalloc.get_traced_memory()[1])
            """,
            PYTHON_POPCONTEST_STATSD_HOST="127.0.0.1",
            PYTHON_POPCONTEST_STATSD_PORT="9",
        )
        self.assertLess(int(result.stdout), 10_000_000)


class TestSelftest(Case):
    def run_selftest(
        self, *flags: str, arguments: Iterable[str] = ("selftest",), **settings: str
    ) -> subprocess.CompletedProcess[str]:
        shutil.copy(SOURCE, self.own / "popcon.py")
        environ = {
            name: value
            for name, value in clean_environ(**settings).items()
            if name not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "HOME")
        }
        return subprocess.run(
            [sys.executable, *flags, *(() if "-m" in flags else ("popcon.py",)), *arguments],
            env=environ,
            cwd=self.own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def test_a_lone_copy_proves_the_whole_way_and_leaves_nothing_behind(self) -> None:
        for flags in (
            [],
            ["-I"],
            ["-S"],
            ["-W", "error"],
            ["-I", "-S", "-W", "error", "-X", "dev"],
            ["-m", "popcon"],
            ["-O"],
        ):
            with self.subTest(flags=flags):
                temporary = self.folder / "temporary"
                temporary.mkdir(exist_ok=True)
                result = self.run_selftest(*flags, TMPDIR=str(temporary))
                self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)
                self.assertIn("and sent python_popcon.library_used.popcon-selftest:1|c\n", result.stdout)
                self.assertNotRegex(result.stdout, "(?m)^error")
                for line in result.stdout.splitlines():
                    self.assertRegex(line, r"^(ok      |warning |error   ) .{12} \S")
                if "-m" in flags:  # which writes one by itself
                    shutil.rmtree(self.own / "__pycache__")
                self.assertEqual([*temporary.iterdir(), *self.own.iterdir()], [self.own / "popcon.py"])

    def test_wrong_settings_are_errors_that_say_what_is_right(self) -> None:
        result = self.run_selftest(
            PYTHON_POPCONTEST_STATSD_HOST="a b",
            PYTHON_POPCONTEST_STATSD_PORT="x",
            PYTHON_POPCONTEST_STATSD_PREFIX="a:b",
            PYTHON_POPCONTEST_STATSD_SAMPLE_RATE="2",
            PYTHON_POPCONTEST_RATE="1",
            DO_NOT_TRACK="1",
        )
        self.assertEqual((result.returncode, result.stderr), (1, ""))
        self.assertEqual(len(re.findall("(?m)^error .*: must be ", result.stdout)), 4, result.stdout)
        self.assertRegex(result.stdout, "(?m)^warning .*PYTHON_POPCONTEST_RATE")
        self.assertRegex(result.stdout, "(?m)^warning .*DO_NOT_TRACK=1: nothing is sent")

    def test_it_says_whether_something_listens(self) -> None:
        with Server() as server:
            result = self.run_selftest(**server.settings)
            self.assertEqual(server.received(), [b""])
            self.assertRegex(result.stdout, r"(?m)^ok       server .*does not refuse")
        result = self.run_selftest(**server.settings)
        self.assertRegex(result.stdout, r"(?m)^error    server .*nothing listens")
        self.assertEqual(result.returncode, 1)
        result = self.run_selftest(PYTHON_POPCONTEST_STATSD_HOST="nowhere.invalid")
        self.assertRegex(result.stdout, r"(?m)^error    server .*nowhere.invalid leads to no address")

    def test_wrong_usage_gets_one_sentence_and_the_usage(self) -> None:
        for arguments in ([], ["nonsense"], ["selftest", "--nonsense"], ["selftest", "more"]):
            result = self.run_selftest(arguments=arguments)
            self.assertEqual((result.returncode, result.stdout), (2, ""))
            self.assertRegex(result.stderr, r"\Ausage: .*\n.*popcon.*: error: .*\n\Z")
            if not arguments:
                self.assertIn("a command is missing: selftest, install, uninstall, usage, run", result.stderr)

    @unittest.skipUnless(os.name == "posix", "needs pipes as POSIX has them")
    def test_a_reader_that_goes_away_is_not_answered_with_a_traceback(self) -> None:
        for command in ("selftest", "uninstall"):
            for unbuffered in ("", "1"):
                reader, writer = os.pipe()
                os.close(reader)
                with self.subTest(command=command, unbuffered=unbuffered), open(writer, "wb") as pipe:
                    ended = subprocess.run(
                        [sys.executable, str(SOURCE), command],
                        env=clean_environ(PYTHONUNBUFFERED=unbuffered),
                        stdout=pipe,
                        stderr=subprocess.PIPE,
                        timeout=60,
                    )
                    self.assertEqual((ended.returncode, ended.stderr), (1, b""))

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "needs Linux with /proc")
    def test_where_nothing_can_be_written_it_works_in_memory(self) -> None:
        out = io.StringIO()
        with (
            mock.patch("tempfile.TemporaryDirectory", side_effect=FileNotFoundError("no usable temporary folder")),
            contextlib.redirect_stdout(out),
        ):
            status = popcon.main(["selftest"])
        self.assertEqual(status, 0, out.getvalue())
        self.assertIn("and sent python_popcon.library_used.popcon-selftest:1|c\n", out.getvalue())

    def test_a_child_that_reports_wrongly_is_an_error(self) -> None:
        for broken, expected in [
            ("setup_reporter = print\n", "said nothing|reported nothing"),
            ("raise RuntimeError('broken')\n", "broken"),
            ("def statsd_line(*a): return b'x'\n", "instead of"),
        ]:
            source = SOURCE.read_text(encoding="utf-8").replace(
                'if __name__ == "__main__":', broken + 'if __name__ == "__main__":'
            )
            if "raise" in broken:
                source = source.replace(broken, f"if __name__ == 'popcon':\n    {broken}")
            (self.own / "broken.py").write_text(source, encoding="utf-8")
            result = subprocess.run(
                [sys.executable, "broken.py", "selftest"],
                cwd=self.own,
                env=clean_environ(),
                capture_output=True,
                text=True,
                timeout=60,
            )
            self.assertEqual(result.returncode, 1)
            self.assertRegex(result.stdout, f"(?m)^error +reporting .*({expected})")

    def test_it_counts_what_can_be_matched_and_names_the_rest(self) -> None:
        self.install("alpha", "alpha.py")
        self.install("meta-package")
        self.install("old", "old.py", record=None)
        self.install("lost", "found.py", record=None)
        (self.site / "nameless-1.0.dist-info").mkdir()
        with mock.patch.object(sys, "path", [str(self.site)]):
            lines = list(command_line._check_libraries())
        self.assertEqual(lines[0][2], "4 installed, 2 can be matched to modules; not lost, meta-package")
        self.assertEqual([line[0] for line in lines], ["ok", "warning"])
        self.assertIn("nameless", lines[1][2])


# Reads all metadata by the slow and plain way of the standard library: which files are whose.
ALL_FILES = r"""
import importlib.metadata, json, os, re
owners = {}
for distribution in importlib.metadata.distributions():
    url = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not url.get("dir_info", {}).get("editable"):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        for file in distribution.files or ():
            if str(file).endswith((".py", ".so")):
                owners.setdefault(os.path.realpath(str(distribution.locate_file(file))), []).append(name)
print(json.dumps(owners))
"""

# Asks every module for its file in the plain way, and looks it up there. Shares nothing with popcon.
ORACLE = r"""
import importlib, json, os, sys
def owners_of_what_is_loaded():
    names = set()
    for module in list(sys.modules.values()):
        if isinstance(module, type(sys)):
            spec = getattr(module, "__spec__", None)
            file = spec.origin if spec is not None and spec.has_location else getattr(module, "__file__", None)
            if isinstance(file, str):
                names.update(owners.get(os.path.realpath(file), ()))
    return names
owners = json.load(open(sys.argv[1]))
job = json.loads(sys.argv[2])
for name in job["before"]:
    importlib.import_module(name)
import popcon
popcon.setup_reporter()
before = owners_of_what_is_loaded()
failed = []
for name in job["imports"]:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed.append(f"{name}: {error!r}")
ours = popcon.used_libraries()
print("\n" + json.dumps({"ours": sorted(ours), "oracle": sorted(owners_of_what_is_loaded() - before), "failed": failed}), flush=True)
os._exit(0)  # what some of them do at exit is not our business
"""

# The names of the modules are unlike the libraries' on purpose.
SESSIONS: list[tuple[list[str], list[str]]] = [
    ([], ["pandas", "matplotlib.pyplot", "sklearn.linear_model", "scipy.stats", "seaborn", "statsmodels.api"]),
    (
        [],
        [
            "yaml",
            "PIL.Image",
            "cv2",
            "bs4",
            "dateutil.parser",
            "_cffi_backend",
            "lxml.etree",
            "docx",
            "OpenSSL",
            "six.moves.urllib.parse",
            "attr",
        ],
    ),
    ([], ["google.cloud.storage", "google.protobuf.message"]),
    ([], ["google.auth"]),
    ([], ["google.cloud.bigquery", "google.api_core"]),
    ([], ["azure.identity"]),
    ([], ["azure.storage.blob", "azure.core"]),
    ([], ["opentelemetry.sdk.trace"]),
    ([], ["opentelemetry.trace"]),
    ([], ["zope.interface"]),
    ([], ["ruamel.yaml"]),
    ([], ["backports.tarfile"]),
    ([], ["jaraco.functools"]),
    ([], ["pip._vendor.rich", "pip._internal.cli.main"]),
    ([], ["librosa", "skimage", "nilearn"]),
    ([], ["librosa", "skimage.filters", "nilearn.plotting"]),
    ([], ["tlz", "distributed", "dask.dataframe", "xarray", "zarr"]),
    ([], ["twisted.internet.defer", "scrapy", "nacl", "paramiko"]),
    (["pandas", "IPython"], ["matplotlib.pyplot", "pandas.io.excel", "requests", "IPython.display"]),
    (["google.auth"], ["google.cloud.storage"]),
    (["six", "numpy"], ["dateutil.rrule", "numpy.fft", "numba"]),
    ([], ["ipykernel", "jupyter_client", "jupyterlab", "notebook"]),
]


# Installs again and again, and dies at each line that writes, and before each system call that changes a folder.
# Then an uninstall, or an install and an uninstall, has to leave the environment as it was.
DEATHS = r"""
import importlib.util, os, pathlib, sys, sysconfig
import popcon, py_compile

def compile(file, doraise):
    # As py_compile does, in less time.
    path = importlib.util.cache_from_source(file)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(f"{path}.{id(path)}", "x").close()
    os.replace(f"{path}.{id(path)}", path)

py_compile.compile = compile

library = os.path.join(sysconfig.get_path("purelib"), "popcon.py")
popcon.load_command_line()
popcon.imported_popcon = lambda: library if os.path.exists(library) else ""
prefix = pathlib.Path(sys.prefix)

def state():
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(prefix.rglob("*"))}

def step(*ignored):
    global left
    left -= 1
    if left == 0:
        os._exit(9)

def lines(frame, event, argument):
    if event == "line":
        step()
    return lines

def changes(event, arguments):
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or event == "open" and arguments[2] & os.O_CREAT:
        step()

def child(work, death=0):
    global left
    process = os.fork()
    if not process:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        left = death
        if death:
            sys.addaudithook(changes)
            sys.settrace(lambda frame, *_: lines if frame.f_code.co_name in ("write", "clean_up") else None)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

before = state()
everywhere = lambda: popcon.install(all_processes=True, vendor=True)
sessions = lambda: popcon.install(vendor=True)
for first in (None, sessions):
    death, ended = 1, 9
    while ended:
        death += 1
        if first:
            assert child(first) == 0
        ended = child(everywhere, death // 2 + 1)
        assert ended in (0, 9), ended
        if death % 2:
            assert child(everywhere) == 0
            assert all(map(os.path.exists, [library, *popcon.activation_files()]))
        assert child(popcon.uninstall) == 0
        after = state()
        if after != before:
            sys.exit(f"died at {death // 2 + 1}: {[path for path in before.keys() | after.keys() if before.get(path, 0) != after.get(path, 0)]}")
    print(death // 2)
"""


def make_wheel(folder: Path) -> Path:
    """popcon as pip takes it, made without the network."""
    wheel = folder / f"popcon-{popcon.__version__}-py3-none-any.whl"
    info = f"popcon-{popcon.__version__}.dist-info"
    files = {
        "popcon.py": SOURCE.read_text(encoding="utf-8"),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: popcon\nVersion: {popcon.__version__}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\npopcon = popcon:main\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


class TestInstall(Case):
    def setUp(self) -> None:
        super().setUp()
        self.prefix = self.folder / "env"
        venv.create(self.prefix, symlinks=os.name != "nt")
        (purelib,) = self.prefix.glob("lib/python*/site-packages")
        self.purelib = purelib.resolve()
        self.startup = self.prefix / "etc" / "ipython" / "startup" / "000-popcon.py"
        self.lone = self.folder / "lone"
        self.lone.mkdir()
        shutil.copy(SOURCE, self.lone)

    def environ(self) -> dict[str, str]:
        """The environment's Python finds nothing but what is in it."""
        return {name: value for name, value in clean_environ().items() if not name.startswith("PYTHON")}

    def run_in_it(self, *arguments: str, cwd: Path | None = None, **settings: str) -> tuple[int, str, str]:
        environ = self.environ() | settings
        # Permissions are to hold for root too.
        humbly = ["setpriv", "--bounding-set=-dac_override"] if os.name != "nt" and os.geteuid() == 0 else []
        result = subprocess.run(
            [*humbly, str(self.prefix / "bin" / "python"), *arguments],
            env=environ,
            cwd=cwd or self.lone,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return result.returncode, result.stdout, result.stderr

    def state(self) -> dict[str, bytes | None]:
        return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(self.prefix.rglob("*"))}

    def test_an_install_followed_by_an_uninstall_leaves_the_environment_as_it_was(self) -> None:
        before = self.state()
        for arguments in (["--vendor"], ["--vendor", "--all-processes"]):
            with self.subTest(arguments=arguments):
                status, out, err = self.run_in_it("popcon.py", "install", *arguments)
                self.assertEqual((status, err), (0, ""))
                after = self.state()
                files = {path for path in after.keys() - before.keys() if after[path] is not None}
                self.assertEqual({f"wrote {path}" for path in files}, set(out.splitlines()))
                self.assertEqual(self.startup.exists(), True)
                self.assertEqual((self.purelib / "popcon.pth").exists(), "--all-processes" in arguments)
                status, out, err = self.run_in_it("popcon.py", "install", *arguments)
                self.assertEqual((status, out[:13], err, self.state()), (0, "nothing to do", "", after))
                status, out, err = self.run_in_it("-m", "popcon", "uninstall", cwd=self.own)
                self.assertEqual((status, err, self.state()), (0, "", before))
        status, out, err = self.run_in_it("popcon.py", "uninstall")
        self.assertEqual((status, out[:13], err), (0, "nothing to do", ""))

    @unittest.skipUnless(hasattr(os, "fork"), "needs os.fork")
    def test_an_install_that_is_killed_is_completed_by_the_next_and_cleaned_up_by_uninstall(self) -> None:
        status, out, err = self.run_in_it("-c", DEATHS)
        self.assertEqual((status, err), (0, ""), out)
        self.assertTrue(all(int(deaths) > 20 for deaths in out.split()), out)

    @unittest.skipUnless(os.name == "posix", "needs locks as POSIX has them")
    def test_installs_at_the_same_moment_wait_for_each_other(self) -> None:
        before = self.state()
        program = [str(self.prefix / "bin" / "python"), "popcon.py", "install", "--vendor"]
        for more in ([], ["--all-processes"], ["--all-processes"]):
            running = [
                subprocess.Popen(
                    program + arguments,
                    env=self.environ(),
                    cwd=self.lone,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
                for arguments in (["--all-processes"], more, [])
            ]
            said = [process.communicate(timeout=60)[0].decode() for process in running]
            self.assertEqual([process.returncode for process in running], [0, 0, 0], said)
            self.assertNotIn("cut short", "".join(said))
            self.assertTrue((self.purelib / "popcon.pth").exists())
            self.assertEqual(self.run_in_it("popcon.py", "uninstall")[0], 0)
            self.assertEqual(self.state(), before)

    def test_what_was_cut_short_is_never_seen(self) -> None:
        """Whoever looks meanwhile finds a file whole, or none."""
        opener = mock.patch("builtins.open", mock.mock_open())
        with opener as opened, mock.patch("os.replace") as replace, mock.patch("os.chmod"):
            command_line.write(str(self.own / "popcon.pth"), b"x")
        (name, _), _ = opened.call_args
        self.assertNotEqual(Path(name).suffix, ".pth")
        replace.assert_called_once_with(name, str(self.own / "popcon.pth"))

    def test_a_popcon_that_cannot_be_imported_is_not_overwritten(self) -> None:
        (self.purelib / "popcon.py").write_text("half a file (")
        before = self.state()
        status, out, err = self.run_in_it("popcon.py", "install", "--vendor")
        self.assertEqual((status, out, self.state()), (1, "", before))
        self.assertRegex(
            err, "^popcon: Python fails to import .*popcon.py, which is left as it is; nothing was changed\n$"
        )

    def test_a_second_install_adds_what_is_missing_and_uninstall_knows_of_both(self) -> None:
        before = self.state()
        self.run_in_it("popcon.py", "install", "--vendor")
        self.assertEqual(self.run_in_it("-m", "popcon", "install", "--all-processes", cwd=self.own)[0], 0)
        self.assertTrue((self.purelib / "popcon.pth").exists())
        self.startup.unlink()
        self.run_in_it("-m", "popcon", "uninstall", cwd=self.own)
        self.assertEqual(
            {path for path, content in self.state().items() if content is not None},
            {path for path, content in before.items() if content is not None},
        )

    def test_what_was_there_before_stays(self) -> None:
        shutil.copy(SOURCE, self.purelib)
        self.write(self.startup.parent, {"500-mine.py": ""})
        self.assertEqual(self.run_in_it("-m", "popcon", "install", cwd=self.own)[0], 0)
        self.write(self.startup.parent, {"600-mine.py": ""})
        self.assertEqual(self.run_in_it("-m", "popcon", "uninstall", cwd=self.own)[0], 0)
        self.assertTrue((self.purelib / "popcon.py").exists())
        self.assertEqual(sorted(path.name for path in self.startup.parent.iterdir()), ["500-mine.py", "600-mine.py"])

    def test_each_process_reports_once_and_silently(self) -> None:
        self.install("alpha", "alpha.py", folder=self.purelib)
        self.run_in_it("popcon.py", "install", "--vendor", "--all-processes")
        with Server() as server:
            ended = self.run_in_it("-W", "error", "-c", "import alpha", cwd=self.own, **server.settings)
            self.assertEqual((ended, server.received()), ((0, "", ""), [b"python_popcon.library_used.alpha:1|c"]))
            shell = f"import runpy; runpy.run_path({str(self.startup)!r}); import alpha"
            self.assertEqual(self.run_in_it("-c", shell, cwd=self.own, **server.settings), (0, "", ""))
            self.assertEqual(server.received(), [b"python_popcon.library_used.alpha:1|c"])

    def test_activation_that_outlives_popcon_never_prints_a_word(self) -> None:
        self.run_in_it("popcon.py", "install", "--vendor", "--all-processes")
        for source in (None, "half a file (", "raise RuntimeError", ""):
            with self.subTest(source=source):
                library = self.purelib / "popcon.py"
                library.unlink() if source is None else library.write_text(source)
                code = f"import runpy; runpy.run_path({str(self.startup)!r})"
                self.assertEqual(self.run_in_it("-W", "error", "-c", code, cwd=self.own), (0, "", ""))

    def test_refuses_with_one_sentence_and_changes_nothing(self) -> None:
        before = self.state()

        def refused(*arguments: str) -> str:
            status, out, err = self.run_in_it(*arguments)
            self.assertEqual((status, out, len(err.splitlines())), (1, "", 1), err)
            self.assertEqual(self.state(), before)
            return err

        self.assertIn("--vendor", refused("popcon.py", "install"))
        self.write(self.startup.parent, {"000-popcon.py": "mine"})
        before = self.state()
        self.assertIn("was not written by popcon", refused("popcon.py", "install", "--vendor"))
        shutil.rmtree(self.prefix / "etc")
        (self.purelib / "popcon.pth").write_text("import sys\n")
        before = self.state()
        self.assertIn("was not written by popcon", refused("popcon.py", "install", "--vendor", "--all-processes"))
        (self.purelib / "popcon.pth").unlink()
        (self.prefix / "etc").write_text("a file where a folder belongs")
        before = self.state()
        self.assertIn("/etc: Not a directory", refused("popcon.py", "install", "--vendor"))
        (self.prefix / "etc").unlink()
        (self.purelib / "popcon.py").write_text("def setup_reporter(): pass")
        before = self.state()
        self.assertIn("another copy of popcon", refused("popcon.py", "install"))

    @unittest.skipUnless(hasattr(os, "geteuid"), "needs permissions")
    def test_who_uses_the_environment_can_read_what_install_wrote_whatever_the_umask(self) -> None:
        before = self.state()
        self.addCleanup(os.umask, os.umask(0o077))
        self.assertEqual(self.run_in_it("popcon.py", "install", "--vendor", "--all-processes")[0], 0)
        made = self.state().keys() - before.keys()
        self.assertEqual(len(made), 8)
        for path in made:
            mode = os.stat(path).st_mode & 0o777
            self.assertEqual(oct(mode), oct(0o755 if os.path.isdir(path) else 0o644), path)

    @unittest.skipUnless(hasattr(os, "geteuid"), "needs permissions")
    def test_a_user_who_may_not_write_is_told_so(self) -> None:
        def read_only(*arguments: str) -> str:
            places = [
                path for path in (self.prefix, *self.prefix.rglob("*")) if path.is_dir() and not path.is_symlink()
            ]
            for place in places:
                place.chmod(0o555)
            before = self.state()
            status, out, err = self.run_in_it(*arguments, cwd=self.lone)
            self.assertEqual((status, out.count("wrote"), self.state()), (1, 0, before))
            for place in places:
                place.chmod(0o755)
            return err

        refused = "Permission denied; nothing was changed\n"
        self.assertRegex(read_only("popcon.py", "install", "--vendor"), f"^popcon: cannot write into .*: {refused}$")
        self.run_in_it("popcon.py", "install", "--vendor")
        self.assertRegex(read_only("popcon.py", "uninstall"), "^popcon: .* cannot be removed: Permission denied\n$")

    @unittest.skipUnless(JUPYTER, "needs POPCON_TEST_JUPYTER, the python of an environment with ipykernel")
    def test_a_kernel_where_all_processes_report_counts_no_shell_and_selftest_sees_what_is_on(self) -> None:
        place = "import ipykernel; print(ipykernel.__path__[0])"
        site = os.path.dirname(subprocess.check_output([JUPYTER, "-c", place], text=True).strip())
        (self.purelib / "jupyter.pth").write_text(site)
        self.install("alpha", "alpha.py", folder=self.purelib)
        self.run_in_it("popcon.py", "install", "--vendor", "--all-processes")
        folders = {"IPYTHONDIR": str(self.folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(self.folder)}
        with Server() as server:
            result = subprocess.run(
                [str(self.prefix / "bin" / "python"), "-W", "ignore", "-c", KERNEL],
                input=json.dumps({"cells": ["1/0", "import alpha"], "end": "kill"}),
                env=clean_environ(PYTHONPATH="", HOME=str(self.own), **server.settings | folders),
                cwd=self.own,
                capture_output=True,
                text=True,
                timeout=120,
            )
            self.assertEqual(result.returncode, 0, result.stderr[-2000:])
            datagrams = server.received(0.5)
        # The first is the kernel's; the driver is a process, and reports what it used itself.
        self.assertEqual(datagrams[0], b"python_popcon.library_used.alpha:1|c")
        self.assertIn(b"jupyter-client", b"".join(datagrams[1:]))
        status, out, _ = self.run_in_it("-m", "popcon", "selftest", cwd=self.own, HOME=str(self.own))
        self.assertEqual(status, 0, out)
        self.assertRegex(out, "(?m)^ok +processes +each reports$")
        self.assertRegex(out, "(?m)^ok +IPython +each session reports$")
        self.assertNotIn("left over", out)
        self.write(
            self.startup.parent, {"050-old.py": "import popularity_contest.reporter", "060-x.py": "import popcon"}
        )
        _, out, _ = self.run_in_it("-m", "popcon", "selftest", cwd=self.own, HOME=str(self.own))
        self.assertRegex(out, "(?m)^warning +left over +one of these is enough: .*000-popcon.py, .*060-x.py$")
        self.assertRegex(out, "(?m)^warning +left over +.*050-old.py counts with popularity-contest, too$")

    def test_selftest_leaves_the_bytecode_in_place_or_warns(self) -> None:
        shutil.copy(SOURCE, self.purelib)
        _, out, _ = self.run_in_it("-m", "popcon", "selftest", cwd=self.own)
        self.assertRegex(out, r"(?m)^ok +bytecode +.*popcon\..*\.pyc$")
        self.assertTrue(list((self.purelib / "__pycache__").glob("popcon.*.pyc")))
        shutil.rmtree(self.purelib / "__pycache__")
        self.purelib.chmod(0o555)
        _, out, _ = self.run_in_it("-m", "popcon", "selftest", cwd=self.own)
        self.purelib.chmod(0o755)
        self.assertRegex(out, "(?m)^warning +bytecode +every start compiles .*Permission denied")

    def test_bytecode_of_an_older_file_is_made_anew(self) -> None:
        self.run_in_it("popcon.py", "install", "--vendor")
        library, compiled = self.purelib / "popcon.py", next(self.purelib.glob("__pycache__/popcon.*.pyc"))
        library.write_text(library.read_text(encoding="utf-8") + "# newer\n", encoding="utf-8")
        compiled.parent.chmod(0o555)
        self.addCleanup(compiled.parent.chmod, 0o755)
        self.assertIn("\nwarning  bytecode     every start compiles", self.run_in_it("-m", "popcon", "selftest")[1])
        compiled.parent.chmod(0o755)
        old = compiled.read_bytes()
        anew = self.run_in_it("-m", "popcon", "install", cwd=self.own, PYTHONDONTWRITEBYTECODE="1")
        self.assertEqual(anew, (0, f"wrote {compiled}\n", ""))
        self.assertNotEqual(compiled.read_bytes(), old)
        self.assertEqual(self.run_in_it("-m", "popcon", "install", cwd=self.own)[1][:13], "nothing to do")
        # Nor is the bytecode of a file that was removed taken for the new one's.
        self.run_in_it("-m", "popcon", "uninstall", cwd=self.own)
        self.write(compiled.parent, {compiled.name: "old"})
        self.assertIn(f"wrote {compiled}\n", self.run_in_it("popcon.py", "install", "--vendor")[1])
        stamp = self.run_in_it("-c", "import importlib.util, sys; print(importlib.util.MAGIC_NUMBER.hex())")[1]
        self.assertEqual(compiled.read_bytes()[:4].hex(), stamp.strip())

    def test_an_install_that_is_interrupted_is_undone_and_no_traceback(self) -> None:
        before = self.state()
        code = """
            import sys, popcon
            def stop(event, arguments):
                if event == "os.rename" and str(arguments[1]).endswith("000-popcon.py"):
                    raise KeyboardInterrupt
            sys.addaudithook(stop)
            sys.exit(popcon.main(["install", "--vendor"]))
            """
        self.assertEqual(self.run_in_it("-c", textwrap.dedent(code)), (130, "", ""))
        self.assertEqual(self.state(), before)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_is_said_in_a_sentence(self) -> None:
        environ = clean_environ()
        for command in (["selftest"], ["uninstall"]):
            with self.subTest(command=command), open("/dev/full", "w") as full:
                ended = subprocess.run(
                    [str(self.prefix / "bin" / "python"), "popcon.py", *command],
                    env=environ,
                    cwd=self.lone,
                    stdout=full,
                    stderr=subprocess.PIPE,
                    text=True,
                    timeout=60,
                )
                self.assertRegex(ended.stderr, r"^popcon: .*No space left on device\n$")
                self.assertEqual(ended.returncode, 1)

    def test_a_path_that_the_encoding_does_not_hold_is_printed_all_the_same(self) -> None:
        lone = self.folder / "ä"
        lone.mkdir()
        shutil.copy(SOURCE, lone)
        status, out, err = self.run_in_it("popcon.py", "install", cwd=lone, PYTHONIOENCODING="ascii")
        self.assertEqual((status, out), (1, ""), err)
        for command in ("selftest", "uninstall"):
            status, out, err = self.run_in_it("popcon.py", command, cwd=lone, PYTHONIOENCODING="ascii")
            self.assertEqual((status, err), (0, ""), out)
        shutil.copytree(self.prefix, self.folder / "ö", symlinks=True)
        self.prefix = self.folder / "ö"
        status, out, err = self.run_in_it("popcon.py", "install", "--vendor", PYTHONIOENCODING="ascii")
        self.assertEqual((status, err), (0, ""), out)
        self.assertIn("\\xf6/lib", out)

    def test_selftest_points_out_what_outlived_popcon(self) -> None:
        self.run_in_it("popcon.py", "install", "--vendor", "--all-processes")
        (self.purelib / "popcon.py").unlink()
        _, out, _ = self.run_in_it("popcon.py", "selftest")
        self.assertRegex(out, "(?m)^warning +left over +popcon itself is gone, but not .*popcon.pth, .*000-popcon.py$")
        self.assertRegex(out, "(?m)^ok +processes +do not report")
        self.assertNotIn("cut short", out)
        shutil.copy(self.startup, self.prefix / "popcon-install.unfinished")
        _, out, _ = self.run_in_it("popcon.py", "selftest")
        self.assertRegex(out, "(?m)^warning +left over +an install was cut short, .*popcon-install.unfinished$")

    def test_an_uninstall_in_a_copied_environment_leaves_the_original_alone(self) -> None:
        self.run_in_it("popcon.py", "install", "--vendor")
        before = self.state()
        copy = self.folder / "copy"
        shutil.copytree(self.prefix, copy, symlinks=True)
        original, self.prefix = self.prefix, copy
        self.assertEqual(self.run_in_it("-m", "popcon", "uninstall", cwd=self.own)[0], 0)
        self.assertEqual(list(copy.rglob("*popcon*")), [])
        self.prefix = original
        self.assertEqual(self.state(), before)

    def test_uninstall_leaves_what_pip_installed_in_the_meantime(self) -> None:
        self.run_in_it("popcon.py", "install", "--vendor")
        self.install("popcon", folder=self.purelib, record="popcon.py,,\n")
        status, out, err = self.run_in_it("-m", "popcon", "uninstall", cwd=self.own)
        self.assertEqual((status, err), (0, ""))
        self.assertIn("it belongs to an installed library", out)
        self.assertTrue((self.purelib / "popcon.py").exists())
        self.assertFalse(self.startup.exists())
        journal = self.prefix / "popcon-install.unfinished"
        self.write(self.purelib, {"popcon.pth": "# somebody else's"})
        theirs = [self.purelib / "popcon.py", self.purelib / "popcon.pth"]
        lines = [f"{command_line.MADE}{path.relative_to(self.prefix)}\n" for path in theirs]
        journal.write_text(f"{command_line.MARK}\n{''.join(lines)}")
        self.assertEqual(self.run_in_it("-m", "popcon", "uninstall", cwd=self.own)[::2], (0, ""))
        self.assertEqual((journal.exists(), [path.exists() for path in theirs]), (False, [True, True]))

    def test_uninstall_removes_all_bytecode_of_the_copy_that_install_made(self) -> None:
        for cache in (False, True):
            with self.subTest(cache=cache):
                if cache:
                    self.write(self.purelib, {"__pycache__/other.cpython-399.pyc": ""})
                before = self.state()
                self.run_in_it("popcon.py", "install", "--vendor")
                self.run_in_it("-m", "popcon", "selftest", cwd=self.own)
                self.run_in_it("-OO", "-m", "popcon", "selftest", cwd=self.own)
                self.write(self.purelib, {"__pycache__/popcon.cpython-399.pyc": ""})
                self.assertEqual(self.run_in_it("-m", "popcon", "uninstall", cwd=self.own)[::2], (0, ""))
                self.assertEqual(self.state(), before)

    @unittest.skipUnless(importlib.util.find_spec("ensurepip"), "needs ensurepip")
    def test_beside_pip_in_any_order(self) -> None:
        wheel = make_wheel(self.folder)
        venv.create(self.prefix, symlinks=os.name != "nt", with_pip=True)
        self.install("alpha", "alpha.py", folder=self.purelib)

        def pip(*arguments: str) -> None:
            status, out, err = self.run_in_it(
                "-m", "pip", "--disable-pip-version-check", *arguments, PIP_ROOT_USER_ACTION="ignore"
            )
            self.assertEqual(status, 0, out + err)

        def changes(before: dict[str, bytes | None]) -> list[str]:
            # pip leaves a __pycache__ behind.
            after = self.state()
            return [path for path in before.keys() | after if before.get(path) != after.get(path)]

        def reported() -> list[bytes]:
            with Server() as server:
                ended = self.run_in_it("-B", "-W", "error", "-c", "import alpha", cwd=self.own, **server.settings)
                self.assertEqual(ended, (0, "", ""))
                return server.received()

        bare = self.state()
        pip("install", "--no-index", "--no-deps", str(wheel))
        installed = self.state()
        self.assertEqual(self.run_in_it("-m", "popcon", "install", "--all-processes", cwd=self.own)[::2], (0, ""))
        self.assertEqual(reported(), [b"python_popcon.library_used.alpha:1|c"])
        status, out, err = self.run_in_it("-m", "popcon", "selftest", cwd=self.own)
        self.assertEqual((status, err), (0, ""), out)
        self.assertRegex(out, "(?m)^ok +processes +each reports$")
        self.assertEqual(self.run_in_it("-m", "popcon", "uninstall", cwd=self.own)[::2], (0, ""))
        self.assertEqual((changes(installed), reported()), ([], []))

        self.assertEqual(self.run_in_it("-m", "popcon", "install", "--all-processes", cwd=self.own)[::2], (0, ""))
        pip("uninstall", "--yes", "popcon")
        self.assertEqual(reported(), [])
        self.assertEqual(self.run_in_it("popcon.py", "uninstall")[::2], (0, ""))
        self.assertEqual(changes(bare), [])

    def test_the_working_folder_and_what_others_print_do_not_mislead_install(self) -> None:
        for path in (f"/nowhere{os.pathsep}", str(self.lone)[:0] + os.pathsep):
            status, _, err = self.run_in_it("popcon.py", "install", PYTHONPATH=path)
            self.assertEqual(status, 1)
            self.assertIn("--vendor", err)
        self.write(self.purelib, {"noise.pth": "import sys; sys.stdout.write('hello')\n"})
        self.assertEqual(self.run_in_it("popcon.py", "install", "--vendor")[::2], (0, ""))
        status, out, err = self.run_in_it("popcon.py", "install")
        self.assertEqual((status, err), (0, ""))
        self.assertIn("nothing to do", out)

    def test_readmes_dockerfiles_switch_it_on(self) -> None:
        lines = re.findall("(?m)^RUN (.*)$", "".join(readme_blocks("dockerfile")))
        self.assertTrue(lines)
        path = f"{self.prefix / 'bin'}{os.pathsep}{os.environ['PATH']}"
        for line in lines:
            ended = subprocess.run(
                line.replace("/tmp/popcon.py", shlex.quote(str(self.lone / "popcon.py"))),
                shell=True,
                env=clean_environ(PYTHONPATH="", PATH=path),
                cwd=self.lone,
                capture_output=True,
                text=True,
            )
            self.assertEqual((ended.returncode, ended.stderr), (0, ""), ended.stdout)
            self.assertTrue(self.startup.exists())

    def test_sitecustomize_in_a_folder_on_pythonpath_reports_too(self) -> None:
        (startup,) = (block for block in readme_blocks("python") if "ImportError" in block)
        self.install("alpha", "alpha.py", folder=self.purelib)
        self.write(self.lone, {"sitecustomize.py": startup})
        with Server() as server:
            settings = server.settings | {"PYTHONPATH": str(self.lone)}
            self.assertEqual(self.run_in_it("-c", "import alpha", cwd=self.own, **settings), (0, "", ""))
            self.assertEqual(server.received(), [b"python_popcon.library_used.alpha:1|c"])

    def test_from_python_3_18_on_a_start_file_activates(self) -> None:
        with mock.patch.object(sys, "prefix", str(self.prefix)):
            for version, name in [((3, 17), "popcon.pth"), ((3, 18), "popcon.start")]:
                names = [Path(path).name for path in command_line.activation_files(version)]
                self.assertEqual(names, ["000-popcon.py", name])
        if sys.version_info < (3, 15):
            return
        self.install("alpha", "alpha.py", folder=self.purelib)
        code = "import popcon; popcon.load_command_line(); popcon.install(all_processes=True, vendor=True, version=(3, 18))"
        self.assertEqual(self.run_in_it("-c", code)[::2], (0, ""))
        self.assertFalse((self.purelib / "popcon.pth").exists())
        with Server() as server:
            ended = self.run_in_it("-c", "import alpha", cwd=self.own, **server.settings)
            self.assertEqual((ended, server.received()), ((0, "", ""), [b"python_popcon.library_used.alpha:1|c"]))


class TestRun(Case):
    def pair(
        self, *arguments: str, input: str = ""
    ) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
        """How python ends with the arguments, and `popcon run` with the same."""
        path = os.pathsep.join([str(self.site), str(HERE)])
        with Server() as server:
            ended = [
                subprocess.run(
                    [sys.executable, *command, *arguments],
                    env=clean_environ(**server.settings | {"PYTHONPATH": path}),
                    cwd=self.own,
                    input=input,
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                for command in ([], ["-m", "popcon", "run"])
            ]
            self.assertEqual(server.received(), [])
        return ended[0], ended[1]

    def assert_same(self, *arguments: str, said: str, input: str = "") -> None:
        """Python and `popcon run` do the same, but that the latter says something at the end."""
        plain, ours = self.pair(*arguments, input=input)
        with self.subTest(arguments=arguments):
            self.assertEqual(
                (ours.returncode, re.sub("0x\\w+", "", ours.stdout)),
                (plain.returncode, re.sub("0x\\w+", "", plain.stdout)),
            )
            self.assertEqual(ours.stderr, plain.stderr + said)

    def test_every_form_of_program_runs_as_python_runs_it(self) -> None:
        program = textwrap.dedent("""
            import os, signal, sys, alpha
            number: int = 1
            print(sys.argv, sys.path, *(f"{name}={value!r}" for name, value in list(globals().items())), sep="\\n")
            print(sys.modules["__main__"].__dict__ is globals(), sys.stdin.read(), flush=True)
            def fail(error=ValueError, cause=None):
                raise error("mine") from cause
            def chain():
                try:
                    fail()
                except ValueError as error:
                    fail(KeyError, error)
            eval(sys.argv[-1])
            """)
        self.install("alpha", "alpha.py")
        for path in ("main.py", "mod.py", "folder/__main__.py", "package/__main__.py"):
            self.write(self.own, {path: f'"""Doc."""{program}'})
        self.write(self.own, {"package/__init__.py": ""})
        py_compile.compile(str(self.own / "main.py"), str(self.own / "main.pyc"))
        with zipfile.ZipFile(self.own / "archive", "w") as archive:
            archive.write(self.own / "main.py", "__main__.py")
        forms = [
            ["main.py"],
            ["./main.py"],
            [str(self.own / "main.py")],
            ["main.pyc"],
            ["folder"],
            ["archive"],
            ["-m", "mod"],
            ["-mmod"],
            ["-m", "package"],
            ["-c", program],
            [f"-c{program}"],
            ["-"],
        ]
        endings = [
            "sys.exit()",
            "sys.exit(7)",
            "sys.exit(-1)",
            "sys.exit('a sentence')",
            "sys.exit((1, None))",
            "chain()",
            "fail(KeyboardInterrupt)",
            "signal.raise_signal(signal.SIGINT)",
            "signal.raise_signal(signal.SIGTERM)",
            "os._exit(3)",
        ]
        jobs = [(form, "fail()") for form in forms]
        jobs += [(form, ending) for form in (["main.py"], ["-m", "mod"], ["-c", program]) for ending in endings]

        for form, ending in jobs:
            silent = "SIGTERM" in ending or "_exit" in ending
            self.assert_same(
                *(form + ["-m", "a b", "--explain", ending]),
                said="" if silent else "python_popcon.library_used.alpha:1|c\n",
                input=program if form == ["-"] else "text",
            )

    def test_runs_a_program_as_python_does_and_says_what_would_be_sent(self) -> None:
        self.install("alpha", "alpha.py", "alpha_tool/__main__.py", source="")
        self.install("beta", "beta/__main__.py", source="import sys, alpha; print(sys.argv, __spec__.name)")
        self.write(
            self.own,
            {
                "hook.py": "import alpha, sys, traceback\nsys.excepthook = lambda kind, error, trace: print(len(traceback.extract_tb(trace)))\n1 / 0\n",
                "late.py": "import atexit, sys\natexit.register(lambda: __import__('alpha'))\n",
                "coded.py": "# -*- coding: latin-1 -*-\nimport alpha\nprint(ascii('\u00c3\u00a9'))\n",
                "future.py": "import alpha\ndef f(x: nothing = 1): pass\nprint(f)"
                if sys.version_info >= (3, 14)
                else "import alpha",
                "workers.py": "import multiprocessing\ndef work(n): return n * 2\nif __name__ == '__main__':\n"
                "    with multiprocessing.get_context('spawn').Pool(1) as pool: print(pool.map(work, [21]))\n    import alpha",
                "syntax.py": "import alpha\n  wrong(\n",
            },
        )
        alpha, beta = (f"python_popcon.library_used.{name}:1|c\n" for name in ("alpha", "beta"))
        nothing = "popcon: nothing would be sent: no library was used\n"
        for name in ("hook.py", "late.py", "coded.py", "future.py", "workers.py"):
            self.assert_same(name, said=alpha)
        self.assert_same("-m", "alpha", "-c", said=alpha)
        self.assert_same("-m", "beta", "-c", "x", said=alpha + beta)
        self.assert_same("-c", "import alpha; 1 / 0", said=alpha)
        if sys.version_info >= (3, 14):
            self.assert_same("-c", "\n  import alpha\n  1 / 0\n", said=alpha)
        self.assert_same("-c", "import sys; sys.stderr = None", said="")
        self.assert_same("-c", "import os; os.close(2)", said="")
        self.assert_same("syntax.py", said=nothing)
        self.assert_same("-", input="  wrong(", said=nothing)
        self.assert_same("-c", "wrong(", said=nothing)
        self.assert_same("-m", "nowhere", said=nothing)
        self.assert_same("nowhere.py", said="")

    def test_a_program_that_is_not_there_or_missing_is_said_in_a_sentence(self) -> None:
        for arguments, sentence in [
            ([], "a program is missing"),
            (["-m"], "a program is missing"),
            (["--explain", "-c"], "a program is missing"),
            (["--wrong"], "unknown option --wrong"),
            (["-W", "error", "-c", ""], ": -W error is for python itself: python -W error -m popcon run ..."),
            (["-OO", "x.py"], ": -OO is for python itself: python -OO -m popcon run ..."),
        ]:
            _, result = self.pair(*arguments)
            self.assertEqual((result.returncode, result.stdout), (2, ""))
            self.assertIn(sentence, result.stderr.splitlines()[-1])

    def test_with_a_wrong_setting_nothing_would_be_sent(self) -> None:
        self.install("alpha", "alpha.py")
        for name in popcon.SETTINGS:
            wrong: dict[str, Any] = {name: "a b"}
            ended = self.run_python("", "-m", "popcon", "run", "-c", "import alpha", **wrong)
            self.assertRegex(ended.stderr, f"^popcon: nothing would be sent: {name}='a b': must be .*\n$")

    def test_of_who_opted_out_nothing_would_be_sent(self) -> None:
        self.install("alpha", "alpha.py")
        said = "popcon: nothing would be sent: DO_NOT_TRACK is set\n"
        for options, lines in (([], said), (["--explain"], "alpha  alpha\n" + said)):
            ended = self.run_python("", "-m", "popcon", "run", *options, "-c", "import alpha", DO_NOT_TRACK="1")
            self.assertEqual((ended.returncode, ended.stdout, ended.stderr), (0, "", lines))
        ended = self.run_python("", "-m", "popcon", "run", "-c", "import alpha", DO_NOT_TRACK="0")
        self.assertEqual(ended.stderr, "python_popcon.library_used.alpha:1|c\n")

    def test_popcon_itself_is_not_what_a_program_used(self) -> None:
        shutil.copy(SOURCE, self.site)
        self.install("popcon", record="popcon.py,,\n")
        self.install("alpha", "alpha.py")
        code = "import popcon; popcon.setup_reporter(); import alpha"
        ended = self.run_python("", "-m", "popcon", "run", "-c", code)
        self.assertEqual(ended.stderr, "python_popcon.library_used.alpha:1|c\n")

    def test_explain_says_of_each_module_whose_it_is_or_why_it_is_nobodys(self) -> None:
        self.install("Alpha.X", "alpha.py")
        self.install("sleepy", "sleepy.py")
        tree = self.folder / "tree"
        editable = {"direct_url.json": json.dumps({"url": tree.as_uri(), "dir_info": {"editable": True}})}
        self.install("edited", more=editable)
        self.write(tree, {"edited.py": ""})
        self.write(self.own, {"mine.py": ""})
        code = f"""
            import sys, importlib.util
            sys.path.append({str(tree)!r})
            import alpha, mine, edited, wave
            spec = importlib.util.find_spec("sleepy")
            spec.loader = importlib.util.LazyLoader(spec.loader)
            sys.modules["sleepy"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules["sleepy"])
            """
        _, result = self.pair("--explain", "-c", textwrap.dedent(code))
        self.assertEqual((result.returncode, result.stdout), (0, ""))
        said = dict(re.findall(r"(?m)^(\w+) +(.*)$", result.stderr))
        self.assertEqual(said["alpha"], "alpha-x")
        self.assertEqual(said["wave"], "not counted: standard library")
        self.assertEqual(said["sleepy"], "not counted: not executed, loaded lazily")
        self.assertRegex(said["mine"], "^not counted: no library lists, .*mine.py$")
        self.assertRegex(said["edited"], "^not counted: an editable install, .*edited.py$")
        self.assertEqual(result.stderr.splitlines()[-1], "python_popcon.library_used.alpha-x:1|c")


# Drives a real kernel: cells come as JSON on stdin, one list for each kernel; what each printed goes out.
KERNEL = """
import json, queue, sys, time
from jupyter_client.manager import start_new_kernel

job = json.load(sys.stdin)
manager, client = start_new_kernel(kernel_name="python3", startup_timeout=60)
out = []

def execute(cell):
    # Now and then a kernel on 3.10 does not hear a request, with or without popcon: ask again.
    # What was heard is waited for: a hook that hangs does so after the cell has begun.
    for attempt in range(3):
        id, text, heard = client.execute(cell), "", False
        while True:
            try:
                message = client.get_iopub_msg(timeout=60 if heard else 10)
            except queue.Empty:
                if heard or attempt == 2:
                    sys.exit(f"no end of {cell!r}; alive: {manager.is_alive()}; so far: {out}, {text!r}")
                break
            if message["parent_header"].get("msg_id") != id:
                continue
            heard = True
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                text += content["text"]
            elif kind == "error":
                text += "".join(content["traceback"])
            elif kind == "status" and content["execution_state"] == "idle":
                return text

for cell in job["cells"]:
    if cell.startswith("COMPLETE "):
        reply = client.complete(cell[9:], reply=True, timeout=60)
        out.append(" ".join(reply["content"]["matches"]))
    elif cell.endswith("?"):
        reply = client.inspect(cell[:-1], reply=True, timeout=60)
        out.append(str(reply["content"]["found"]))
        out.append(execute(cell))
    else:
        out.append(execute(cell))
start = time.monotonic()
if job["end"] == "kill":
    client.execute("while True: pass")
    time.sleep(0.3)
    manager.shutdown_kernel(now=True)
elif job["end"] == "restart":
    client.execute("while True: pass")
    time.sleep(0.3)
    manager.restart_kernel(now=True)
    client.wait_for_ready(timeout=60)
    manager.shutdown_kernel()
else:
    manager.shutdown_kernel()
print(json.dumps({"out": out, "end": time.monotonic() - start}))
"""


@unittest.skipUnless(JUPYTER, "needs POPCON_TEST_JUPYTER, the python of an environment with ipykernel, bs4, sympy")
class TestShells(Case):
    def setUp(self) -> None:
        super().setUp()
        (startup,) = (block for block in readme_blocks("python") if "ImportError" in block)
        self.startup = self.folder / "ipython" / "profile_default" / "startup"
        self.write(self.startup, {"000-popcon.py": startup})
        self.install("alpha", "alpha.py")
        self.server = self.enterContext_(Server())

    def environ(self, **settings: str) -> dict[str, str]:
        folders = {"IPYTHONDIR": str(self.folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(self.folder)}
        own = {"PYTHONPATH": os.pathsep.join([str(HERE), str(self.site)]), "HOME": str(self.own)}
        return clean_environ(**self.server.settings | folders | own | settings)

    def kernel(self, *cells: str, end: str = "shutdown", **settings: str) -> tuple[list[str], float]:
        """What each cell of a real kernel printed, and how long the kernel took to end, in seconds."""
        result = subprocess.run(
            [JUPYTER, "-W", "ignore", "-c", KERNEL],
            input=json.dumps({"cells": cells, "end": end}),
            env=self.environ(**settings),
            cwd=self.own,
            capture_output=True,
            text=True,
            timeout=120,
        )
        self.assertEqual(result.returncode, 0, result.stderr[-2000:])
        answer = json.loads(result.stdout.splitlines()[-1])
        return answer["out"], answer["end"]

    def test_a_session_that_uses_no_library_sends_nothing(self) -> None:
        out, _ = self.kernel(
            "1+1",
            "print('hi')",
            "1/0",
            "len?",
            "COMPLETE import o",
            "COMPLETE pri",
            "%timeit -n1 -r1 1",
            "%pwd",
            "%who",
        )
        self.assertEqual(out[1], "hi\n")
        self.assertIn("ZeroDivisionError", out[2])
        self.assertNotIn("popcon", "".join(out))
        self.assertIn("print", out[6])
        self.assertEqual(self.server.names(0.5), [])

    def test_a_persons_own_popcon_is_left_alone_and_ours_shows_nowhere(self) -> None:
        self.write(self.startup, {"000-popcon.py": command_line.STARTUP})
        cells = ["import alpha", "print([name for name in dir() if 'popcon' in name], end='')"]
        self.assertEqual(self.kernel(*cells)[0], ["", "[]"])
        self.assertEqual(self.server.names(), ["alpha"])
        path = {"PYTHONPATH": os.pathsep.join(map(str, [self.own, HERE, self.site]))}
        self.write(self.own, {"popcon.py": "raise SystemExit('run')\n"})
        self.assertEqual(self.kernel(*cells, **path)[0], ["", "[]"])
        self.write(self.own, {"popcon.py": "mine = 1\n"})
        self.assertEqual(self.kernel("import popcon; print(popcon.mine, end='')", **path)[0], ["1"])
        self.assertEqual(self.server.names(0.5), [])

    def test_what_is_imported_in_cells_counts_once(self) -> None:
        package, known = ("pandas", {"pandas", "numpy"}) if LARGE else ("sympy", {"sympy", "mpmath"})
        cells = [
            f"import {package}",
            "import alpha",
            "1/0",
            f"import {package}, alpha",
            "%reset -f",
            "import popcon; popcon.setup_reporter()",
        ]
        out, _ = self.kernel(*cells, "import bs4; print(popcon.report())")
        self.assertIn("'beautifulsoup4'", out[-1])
        received = self.server.names(0.5)
        self.assertEqual(len(received), len(set(received)))
        self.assertLessEqual(known | {"alpha", "beautifulsoup4"}, set(received))
        self.assertFalse(set(received) & {"ipython", "ipykernel", "executing", "stack-data", "jedi", "parso", "six"})

    def test_a_kernel_that_is_killed_loses_nothing_of_an_earlier_cell(self) -> None:
        for end in ("kill", "restart"):
            with self.subTest(end=end):
                self.kernel("import alpha", end=end)
                self.assertEqual(self.server.names(0.5), ["alpha"])

    def test_what_a_library_of_the_baseline_merely_requires_still_counts(self) -> None:
        self.install(
            "helper", "helper.py", more={"METADATA": "Metadata-Version: 2.1\nName: helper\nRequires-Dist: alpha\n"}
        )
        self.write(self.startup, {"000-a.py": "import helper"})
        self.kernel("import alpha, helper")
        self.assertEqual(self.server.names(0.5), ["alpha"])

    def test_the_hook_survives_a_reset_is_there_once_and_shows_nowhere(self) -> None:
        check = """
            import popcon
            popcon.setup_reporter(); popcon.setup_reporter()
            print(get_ipython().events.callbacks["post_execute"].count(popcon._report_after_cell))
            """
        fails = "import popcon, sys; popcon.Reporter.newest = lambda self: sys.exit(3)"
        out, _ = self.kernel("%reset -f", textwrap.dedent(check), "import alpha", fails, "1", "print(2)")
        self.assertEqual(out[1:], ["1\n", "", "", "", "2\n"])
        self.assertEqual(self.server.names(0.5), ["alpha"])

    def test_a_silent_name_server_is_not_felt_in_a_kernel(self) -> None:
        with Server() as name_server:
            self.write(self.startup, {"001-silent.py": name_server.silences()})
            timed = "import time; start = time.monotonic()"
            out, end = self.kernel(
                timed,
                "import alpha",
                "print(time.monotonic() - start < 5)",
                "import bs4",
                end="shutdown",
                PYTHON_POPCONTEST_STATSD_HOST="statsd.example",
            )
            self.assertEqual((out, len(name_server.received(0.5))), (["", "", "True\n", ""], 2))  # one cell, one exit
            self.assertLess(end, 4)

    def test_terminal_ipython_works_the_same(self) -> None:
        code = """
            import os, pexpect, sys
            shell = pexpect.spawn(sys.executable, ["-m", "IPython", "--simple-prompt", "--no-banner"], encoding="utf-8", timeout=60)
            for line in ("1/0", "import alpha", "print(6 * 7)"):
                shell.expect(r"In \\[\\d+\\]: ")
                shell.sendline(line)
            shell.expect("42")
            shell.expect(r"In \\[\\d+\\]: ")
            shell.kill(9)
            """
        subprocess.run(
            [JUPYTER, "-c", textwrap.dedent(code)], env=self.environ(), cwd=self.own, check=True, timeout=120
        )
        self.assertEqual(self.server.names(0.5), ["alpha"])


@unittest.skipUnless(hasattr(os, "fork"), "needs os.fork")
class TestForks(Case):
    def setUp(self) -> None:
        super().setUp()
        for name in ("alpha", "beta"):
            self.install(name, f"{name}.py")

    def counts(self, code: str, python: str = sys.executable, **settings: str) -> dict[str, int]:
        """How often each library was sent by a program and all that it starts."""
        with Server() as server:
            self.write(self.own, {"program.py": textwrap.dedent(code)})
            path = os.pathsep.join([str(self.site), str(HERE)])
            result = subprocess.run(
                [python, "-W", "error::DeprecationWarning:__main__", "program.py"],
                env=clean_environ(**server.settings | {"PYTHONPATH": path} | settings),
                cwd=self.own,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=60,
            )
            self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)
            names = server.names(0.2)
        return {name: names.count(name) for name in names}

    def test_what_the_parent_loaded_is_the_parents(self) -> None:
        code = """
            import popcon; popcon.setup_reporter()
            import alpha, os, sys
            children = [os.fork() or sys.exit(0) for _ in range(3)]
            for child in children:
                os.waitpid(child, 0)
            """
        self.assertEqual(self.counts(code), {"alpha": 1})

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
        if {reporting}:
            import popcon; popcon.setup_reporter()
        import alpha

        def work(number):
            import beta
            {work}

        if __name__ == "__main__":
            import multiprocessing, concurrent.futures
            context = multiprocessing.get_context("{method}")
            {run}
        """

    def worker_counts(self, method: str, run: str, work: str = "pass", reporting: str = "True") -> dict[str, int]:
        run = textwrap.indent(textwrap.dedent(run), " " * 12).strip()
        return self.counts(self.WORKER.format(method=method, run=run, work=work, reporting=reporting))

    def test_workers_of_multiprocessing_report_what_they_imported_themselves(self) -> None:
        process = """
            workers = [context.Process(target=work, args=(n,)) for n in range(3)]
            for worker in workers: worker.start()
            for worker in workers: worker.join()
            """
        pool = "pool = context.Pool(1); pool.map(work, range(3)); pool.close(); pool.join()"
        executor = """
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                list(pool.map(work, range(3)))
            """
        for method, run, expected in [
            ("fork", process, {"alpha": 1, "beta": 3}),
            ("fork", pool, {"alpha": 1, "beta": 1}),
            ("fork", executor, {"alpha": 1, "beta": 1}),
            # These import the program anew, the set-up in it too: each worker loads alpha by itself.
            ("spawn", process, {"alpha": 4, "beta": 3}),
            ("spawn", executor, {"alpha": 2, "beta": 1}),
            # From 3.14 on, the server of forks does so, once for all.
            ("forkserver", process, {"alpha": 4 if sys.version_info < (3, 14) else 2, "beta": 3}),
        ]:
            with self.subTest(method=method, run=run):
                self.assertEqual(self.worker_counts(method, run), expected)

    def test_the_workers_of_a_pool_that_is_terminated_can_send_early(self) -> None:
        run = """
            with context.Pool(1) as pool:
                pool.map(work, range(3))
            """
        self.assertEqual(self.worker_counts("fork", run, "popcon.report()"), {"alpha": 1, "beta": 1})

    @unittest.skipUnless(LARGE, "needs POPCON_TEST_LARGE, the python of an environment with joblib and gunicorn")
    def test_workers_of_loky_report_if_the_reporter_is_set_up_in_them(self) -> None:
        code = """
            import popcon; popcon.setup_reporter()
            from joblib import Parallel, delayed

            def work(number):
                {}
                import beta

            if __name__ == "__main__":
                Parallel(n_jobs=2)(delayed(work)(n) for n in range(4))
                from joblib.externals.loky import get_reusable_executor
                get_reusable_executor().shutdown()
            """
        self.assertNotIn("beta", self.counts(code.format("pass"), LARGE))
        counted = self.counts(code.format("import popcon; popcon._is_set_up or popcon.setup_reporter()"), LARGE)
        self.assertIn(counted["beta"], (1, 2))

    @unittest.skipUnless(LARGE, "needs POPCON_TEST_LARGE, the python of an environment with joblib and gunicorn")
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
            port = tcp.getsockname()[1]
        with Server() as server:
            path = os.pathsep.join([str(self.site), str(HERE)])
            process = subprocess.Popen(
                [LARGE, "-m", "gunicorn", "--preload", "--workers=2", f"--bind=127.0.0.1:{port}", "application:app"],
                env=clean_environ(**server.settings | {"PYTHONPATH": path}),
                cwd=self.own,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                for _ in range(100):
                    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
                        break
                    time.sleep(0.1)
            finally:
                process.terminate()
                process.wait(30)
            names = server.names(0.5)
        self.assertEqual(names.count("alpha"), 1)
        self.assertEqual(names.count("beta"), 1)  # one worker had the request


class TestRequirements(unittest.TestCase):
    def test_markers_extras_and_versions(self) -> None:
        for text, extra, expected in [
            ("a", "", ["a"]),
            ("A.b[x, Y_z]>=1,<2 ; python_version >= '3.8'", "", ["a-b", "a-b+x", "a-b+y-z"]),
            ("a (>=1)", "", ["a"]),
            ("a @ https://x.example/a.whl ; extra == 'test'", "", []),
            ("a; extra == 'Dev_Test'", "dev-test", ["a"]),
            ("a; extra != 'x'", "", ["a"]),
            ("a; python_version < '3.9' and python_version > '3.9' or os_name == '" + os.name + "'", "", ["a"]),
            ("a; python_version < '3.9' and (python_version > '3.9' or os_name == '" + os.name + "')", "", []),
            ("a; python_version < '3.10'", "", []),
            ("a; python_version == '3.*'", "", ["a"]),
            ("a; python_version != '3.*'", "", []),
            ("a; python_version ~= '3.6'", "", ["a"]),
            ("a; python_version ~= '2.6'", "", []),
            ("a; python_full_version >= '3.9.0rc1'", "", ["a"]),
            ("a; python_version in '2.7 3.1'", "", []),
            ("a; sys_platform not in 'nothing'", "", ["a"]),
            ("a; platform_system == 'None' or implementation_name == '" + sys.implementation.name + "'", "", ["a"]),
        ]:
            with self.subTest(text=text):
                found = [name + ("+" + extra if extra else "") for name, extra in popcon.requirement(text, extra)]
                self.assertEqual(found, expected)
        for text in (
            "",
            "[x]",
            "a; nonsense",
            "a; (os_name == 'x'",
            "a; os_name 'x'",
            "a; os_name == 'x')",
            "a; os_name = 'x'",
        ):
            with self.subTest(text=text), self.assertRaises(ValueError):
                popcon.requirement(text)

    def test_versions_order_as_pep_440_says(self) -> None:
        ordered = ["1.dev1", "1a1", "1b2", "1rc1", "1", "1.post1", "1.0.1", "1.2", "1.10"]
        for index, left in enumerate(ordered):
            for other, right in enumerate(ordered):
                with self.subTest(left=left, right=right):
                    self.assertEqual(popcon._compare(left, "<", right, False), index < other)
                    self.assertEqual(popcon._compare(left, ">=", right, False), index >= other)

    @unittest.skipUnless(LARGE, "needs POPCON_TEST_LARGE, the python of an environment of several hundred libraries")
    def test_agrees_with_the_packaging_library_on_every_requirement_of_a_large_environment(self) -> None:
        code = """
            import popcon
            from importlib.metadata import distributions
            from packaging.requirements import Requirement
            from packaging.utils import canonicalize_name
            texts = {text for library in distributions() for text in library.requires or ()}
            for text in texts:
                for extra in ("", "test", "dev-test", "all"):
                    theirs = Requirement(text)
                    name = canonicalize_name(theirs.name)
                    expected = {(name, ""), *((name, canonicalize_name(extra)) for extra in theirs.extras)}
                    if theirs.marker and not theirs.marker.evaluate({"extra": extra}):
                        expected = set()
                    assert set(popcon.requirement(text, extra)) == expected, (text, extra)
            print(len(texts))
            """
        out = subprocess.check_output([LARGE, "-c", textwrap.dedent(code)], env=clean_environ(), text=True, timeout=120)
        self.assertGreater(int(out), 1000)


# Whatever stands in the metadata: nothing is raised, good distributions count, a line is a line.
FUZZ = r"""
import os, re, shutil, sys, tempfile
import popcon
from hypothesis import HealthCheck, given, settings, strategies as st

parts = st.sampled_from([b"a/b.py", b",", b"\n", b"\r\n", b'"', b"Name:", b" ", b"x", b":1|c", b"\0", b"..", b"/", b"\xff",
                         b"a", b"top", b"Requires-Dist:", b"; extra == 'x'", b"(", b"[", b"]", b"good.py", b"\xc3\xa9"])
rubbish = st.one_of(st.binary(max_size=60), st.lists(parts, max_size=20).map(b"".join))
names = st.sampled_from(["RECORD", "METADATA", "PKG-INFO", "top_level.txt", "direct_url.json"])
folders = st.sampled_from(["a-1.dist-info", "A.egg-info", "b.dist-info", ".dist-info", "-.dist-info", "top.egg-info"])
base = os.path.realpath(tempfile.mkdtemp())
site = os.path.join(base, "site-packages")
sys.path.append(site)

@settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.tuples(folders, names), rubbish, max_size=8))
def metadata(files):
    shutil.rmtree(site, ignore_errors=True)
    good = {("good-1.dist-info", "RECORD"): b"good.py,,\n", ("good-1.dist-info", "METADATA"): b"Name: good\n"}
    for (folder, name), content in {**files, **good}.items():
        os.makedirs(os.path.join(site, folder), exist_ok=True)
        with open(os.path.join(site, folder, name), "wb") as file:
            file.write(content)
    (found,) = popcon.libraries({os.path.join(site, path): path[:-3].replace("/", ".") for path in ("good.py", "a/b.py", "top.py")})
    assert "good" in found
    for name in found | {"good"}:
        assert re.fullmatch(rb"p\.[a-z0-9]+(-[a-z0-9]+)*:1\|c", popcon.statsd_line(name, "p")), name
    popcon.required(["a", "top", "b", "good"])

@settings(max_examples=2000, deadline=None, database=None)
@given(rubbish)
def requirement(text):
    try:
        popcon.requirement(text.decode("utf-8", "replace"), "x")
    except ValueError:
        pass

try:
    metadata()
    requirement()
finally:
    shutil.rmtree(base)
print("ok")
"""


class TestRealThings(Case):
    @unittest.skipUnless(LARGE, "needs POPCON_TEST_LARGE, the python of an environment of several hundred libraries")
    def test_agrees_with_a_plain_reading_of_all_metadata_in_a_large_environment(self) -> None:
        python = [LARGE, "-W", "ignore", "-c"]
        owners = self.folder / "owners.json"
        owners.write_bytes(subprocess.check_output([*python, ALL_FILES], env=clean_environ(), timeout=120))

        def session(job: tuple[list[str], list[str]]) -> dict[str, Any]:
            result = subprocess.run(
                [*python, ORACLE, str(owners), json.dumps({"before": job[0], "imports": job[1]})],
                env=clean_environ(),
                cwd=self.own,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=120,
            )
            if result.returncode:
                raise AssertionError(result.stderr.decode()[-1000:])
            return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]

        total = set()
        with ThreadPoolExecutor(2) as pool:
            for (before, imports), result in zip(SESSIONS, pool.map(session, SESSIONS), strict=True):
                with self.subTest(before=before, imports=imports):
                    self.assertEqual(result["failed"], [])
                    self.assertEqual(result["ours"], result["oracle"])
                    self.assertTrue(result["ours"])
                    total |= set(result["ours"])
        self.assertGreater(len(total), 100)

    @unittest.skipUnless(
        DEBIAN,
        "needs POPCON_TEST_DEBIAN, root folders with Debian's python3 and python3-numpy, -yaml, -bs4, -six, -ruamel.yaml",
    )
    def test_is_right_where_debian_left_no_record(self) -> None:
        code = "import sys; sys.path.append('/tmp'); import popcon; popcon.setup_reporter(); import {}; print(*sorted(popcon.used_libraries()))"
        for root in DEBIAN:
            copy = Path(root, "tmp", "popcon.py")
            shutil.copy(SOURCE, copy)
            try:
                for imports, expected in [
                    ("numpy", "numpy"),
                    ("yaml", "pyyaml"),
                    ("six", "six"),
                    ("six.moves.urllib", "six"),
                    ("json", ""),
                    ("ruamel.yaml", "ruamel-yaml ruamel-yaml-clib"),
                    ("bs4", "beautifulsoup4 soupsieve typing-extensions"),
                ]:
                    with self.subTest(root=root, imports=imports):
                        out = subprocess.run(
                            ["chroot", root, "python3", "-B", "-c", code.format(imports)],
                            env={"PATH": "/usr/sbin:/usr/bin:/bin"},
                            capture_output=True,
                            text=True,
                        )
                        # bs4 imports the parsers that happen to be there
                        self.assertEqual(
                            (set(out.stdout.split()) - {"lxml", "chardet", "html5lib"}, out.stderr),
                            (set(expected.split()), ""),
                        )
            finally:
                copy.unlink()

    @unittest.skipUnless(EXPORTER, "needs POPCON_TEST_STATSD_EXPORTER, the path of statsd_exporter")
    def test_the_real_exporter_counts_each_process_once(self) -> None:
        for name in ("alpha", "ruamel.yaml"):
            self.install(name, f"{name.partition('.')[0]}.py")
        for prefix, mapping, labels in [
            ("", readme_mappings()[0], 'library="{}"'),
            ("python_popcon.namespace.prod.library_used", readme_mappings()[1], 'library="{}",namespace="prod"'),
        ]:
            with self.subTest(prefix=prefix), self.exporter(mapping) as (settings, metrics):
                settings |= {"PYTHON_POPCONTEST_STATSD_PREFIX": prefix}
                for code in ("import alpha", "import alpha, ruamel", "import json"):
                    self.run_python("import popcon; popcon.setup_reporter()\n" + code, **settings)
                self.run_python("import popcon; popcon.main(['selftest'])", **settings)
                time.sleep(0.5)
                ours = {name: value for name, value in metrics().items() if "popcon" in name}
                self.assertEqual(
                    ours,
                    {
                        f"python_popcon_library_used{{{labels.format('alpha')}}}": 2,
                        f"python_popcon_library_used{{{labels.format('ruamel')}}}".replace("ruamel", "ruamel-yaml"): 1,
                    },
                )

    @unittest.skipUnless(EXPORTER and LARGE, "needs POPCON_TEST_STATSD_EXPORTER and POPCON_TEST_LARGE")
    def test_a_real_script_with_real_libraries_shows_exactly_those_at_the_exporter(self) -> None:
        code = "import popcon; popcon.setup_reporter(); import pandas, sklearn.linear_model, yaml; print(*sorted(popcon.used_libraries()))"
        with self.exporter(readme_mappings()[0]) as (settings, metrics):
            out = subprocess.run(
                [LARGE, "-c", code], env=clean_environ(**settings), cwd=self.own, capture_output=True, text=True
            )
            time.sleep(0.5)
            counted = {name: value for name, value in metrics().items() if name.startswith("python_popcon")}
        self.assertLessEqual({"pandas", "numpy", "scikit-learn", "scipy", "pyyaml", "joblib"}, set(out.stdout.split()))
        self.assertEqual(counted, {f'python_popcon_library_used{{library="{name}"}}': 1 for name in out.stdout.split()})

    @contextlib.contextmanager
    def reference_server(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """The reference statsd server: the settings for it, and a function that gives its counters."""
        with Server() as server, socket.create_server(("127.0.0.1", 0)) as tcp:
            settings, port = server.settings, tcp.getsockname()[1]
        config = {
            "port": int(settings["PYTHON_POPCONTEST_STATSD_PORT"]),
            "address": "127.0.0.1",
            "mgmt_port": port,
            "mgmt_address": "127.0.0.1",
            "backends": [],
            "flushInterval": 60000,
        }
        (self.folder / "config.js").write_text(json.dumps(config))
        # It has no setting for its receive buffer; on its own machine sysctl net.core.rmem_default is for that.
        buffer = """
            const dgram = require("dgram"), create = dgram.createSocket;
            dgram.createSocket = (type, callback) => create({type, recvBufferSize: 4194304}, callback);
            """
        (self.folder / "buffer.js").write_text(buffer)
        command = ["node", "-r", str(self.folder / "buffer.js"), STATSD, str(self.folder / "config.js")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def counters() -> dict[str, int]:
            answer = ""
            with socket.create_connection(("127.0.0.1", port), timeout=5) as management:
                management.sendall(b"counters\n")
                while "END" not in answer:
                    answer += management.recv(65536).decode()
            return {name: int(value) for name, value in re.findall(r"'?([\w.-]+)'?: (\d+)", answer)}

        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                    break
                time.sleep(0.1)
            yield settings, counters
        finally:
            process.kill()
            process.wait()

    @unittest.skipUnless(STATSD, "needs POPCON_TEST_STATSD, the path of the reference server's stats.js")
    def test_the_reference_statsd_server_scales_the_sample_back(self) -> None:
        self.install("alpha", "alpha.py")
        code = "import popcon; r = popcon.Reporter(); r.drawn = True; import alpha; r.report()"
        with self.reference_server() as (settings, counters):
            self.run_python(code, PYTHON_POPCONTEST_STATSD_SAMPLE_RATE="0.1", **settings)
            self.run_python(code, **settings)
            time.sleep(0.5)
            counted = counters()
        self.assertEqual(counted["python_popcon.library_used.alpha"], 11)
        self.assertEqual(counted["statsd.bad_lines_seen"], 0)

    LOAD = """
        import os, sys, time
        import popcon; popcon.setup_reporter()
        processes, libraries = 500, 50
        gate, opener = os.pipe()
        for _ in range(processes):
            if not os.fork():
                os.close(opener)
                for number in range(libraries):
                    __import__(f"library_{number}")
                os.read(gate, 1)
                sys.exit()
        os.close(opener)
        start = time.monotonic()
        for _ in range(processes):
            os.wait()
        print(time.monotonic() - start)
        """

    def load(self, settings: dict[str, Any]) -> None:
        """Let 500 processes that used 50 libraries each end at once."""
        for number in range(50):
            self.install(f"library-{number}", f"library_{number}.py")
        result = self.run_python(self.LOAD, **settings)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertLess(float(result.stdout), 30)
        time.sleep(1)

    @unittest.skipUnless(EXPORTER, "needs POPCON_TEST_STATSD_EXPORTER, the path of statsd_exporter")
    def test_nothing_is_lost_at_the_real_exporter_when_500_processes_end_at_once(self) -> None:
        with self.exporter(readme_mappings()[0]) as (settings, metrics):
            self.load(settings)
            counted = {name: value for name, value in metrics().items() if name.startswith("python_popcon")}
        self.assertEqual(
            counted, {f'python_popcon_library_used{{library="library-{number}"}}': 500 for number in range(50)}
        )

    @unittest.skipUnless(STATSD, "needs POPCON_TEST_STATSD, the path of the reference server's stats.js")
    def test_nothing_is_lost_at_the_reference_server_when_500_processes_end_at_once(self) -> None:
        with self.reference_server() as (settings, counters):
            self.load(settings)
            counted = {name: value for name, value in counters().items() if name.startswith("python_popcon")}
        self.assertEqual(counted, {f"python_popcon.library_used.library-{number}": 500 for number in range(50)})

    @unittest.skipUnless(LARGE, "needs POPCON_TEST_LARGE, the python of an environment with hypothesis")
    def test_no_metadata_raises_or_adds_a_line(self) -> None:
        result = subprocess.run(
            [LARGE, "-W", "ignore", "-c", FUZZ],
            env=clean_environ(),
            cwd=self.own,
            capture_output=True,
            text=True,
            timeout=120,
        )
        self.assertEqual((result.returncode, result.stdout), (0, "ok\n"), result.stderr[-3000:])


# Run in a large environment, with lists of libraries to be removed: what of them is needed by what stays, as the
# packaging library reads the requirements, and as imports tell when the modules of the last list cannot be found.
STAYS = """
import functools, importlib, importlib.metadata, json, sys
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

required = functools.cache(Requirement)
libraries = {canonicalize_name(library.metadata["Name"]): library for library in importlib.metadata.distributions()}
requirements = {name: [required(text) for text in library.requires or ()] for name, library in libraries.items()}
needed = set()
for gone in map(set, json.loads(sys.argv[1])):
    assert gone < libraries.keys()
    queue = [(name, "") for name in libraries.keys() - gone]
    known = set(queue)
    for name, extra in queue:
        for one in requirements.get(name, ()):
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                other = canonicalize_name(one.name)
                if other in gone:
                    needed.add(f"{name} needs {other}")
                new = {(other, extra) for extra in one.extras} - known
                known |= new
                queue += new

kept_files = {str(file) for name in libraries.keys() - gone for file in libraries[name].files or ()}
gone_files = {str(file) for name in gone for file in libraries[name].files or ()}
modules = {
    file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for file in gone_files - kept_files if file.endswith(".py") and ".dist-info/" not in file
}

class Gone:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Gone)
failed = []
tops = ["pandas", "sklearn.linear_model", "matplotlib.pyplot", "requests", "google.cloud.storage", "ruamel.yaml", "spacy"]
for top in tops:
    try:
        importlib.import_module(top)
    except ImportError as error:
        failed.append(f"{top}: {error}")
print(json.dumps({"needed": sorted(needed), "failed": failed}))
"""


class Pages(ThreadingHTTPServer):
    """A web server that answers what it is told, and keeps what it was asked."""

    def __init__(self, answer: Callable[[str], tuple[int, dict[str, str], bytes]]) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        pages = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                pages.asked.append((self.path, dict(self.headers)))
                status, headers, body = answer(self.path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *ignored: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()


class TestUsage(Case):
    def counted(self, since: float = 1.0, **counts: float) -> str:
        """The path of an exporter's saved metrics with these counts."""
        lines = [f'python_popcon_library_used{{library="{name}"}} {count}\n' for name, count in counts.items()]
        path = self.folder / "metrics.txt"
        path.write_text(f"# HELP x\nprocess_start_time_seconds {since}\n" + "".join(lines))
        return str(path)

    def rows(self, *arguments: str, **options: str) -> dict[str, dict[str, Any]]:
        ended = self.usage("--json", *arguments, **options)
        self.assertEqual((ended.returncode, ended.stderr), (0, ""))
        rows = json.loads(ended.stdout)
        self.assertEqual([row["library"] for row in rows], sorted({row["library"] for row in rows}))
        return {row.pop("library"): row for row in rows}

    def states(self, *arguments: str, **options: str) -> dict[str, str]:
        return {name: row["status"] for name, row in self.rows(*arguments, **options).items()}

    def requiring(self, name: str, *requirements: str, **options: Any) -> Path:
        lines = "".join(f"Requires-Dist: {text}\n" for text in requirements)
        metadata = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{lines}\nRequires-Dist: text\n"}
        return self.install(name, f"{name}.py", more=metadata | options.pop("more", {}), **options)

    def test_json_tells_of_each_library_what_is_documented(self) -> None:
        self.requiring("Alpha", "beta", "gone; python_version < '3'", "tester; extra == 'test'")
        for name in ("beta", "tester"):
            self.install(name, f"{name}.py", f"{name}_more/__init__.py", source="pass\n")
        self.install("types-x", "x-stubs/__init__.pyi")
        compiled = self.site / "__pycache__"
        self.write(compiled, {"beta.cpython-310.pyc": "12345", "beta_x.cpython-310.pyc": "not beta's"})
        rows = self.rows("--metrics", self.counted(alpha=3, private=2))
        size = {
            name: sum(path.stat().st_size for path in self.site.glob(f"{name}-*/*")) + 2 * len("pass\n")
            for name in ("beta", "tester")
        }
        common = {"version": "1.0", "processes": 0, "required_by": [], "reason": ""}
        self.assertEqual(
            rows["beta"], common | {"status": "required", "required_by": ["alpha"], "bytes": size["beta"] + 5}
        )
        self.assertEqual(rows["tester"], common | {"status": "unused", "bytes": size["tester"]})
        self.assertEqual(rows["alpha"]["status"], "used")
        self.assertEqual(rows["types-x"]["status"], "unknown")
        self.assertEqual(rows["types-x"]["reason"], "has nothing to import")
        absent = common | {"version": None, "processes": 2, "status": "absent", "bytes": None}
        self.assertEqual(rows["private"], absent)
        self.assertEqual(list(rows), ["alpha", "beta", "private", "tester", "types-x"])

    def test_unused_prints_the_names_that_can_go_and_nothing_else(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            self.install(name, f"{name}.py")
        ended = self.usage("--metrics", self.counted(beta=1), "--unused")
        self.assertEqual((ended.returncode, ended.stdout, ended.stderr), (0, "alpha\ngamma\n", ""))

    def test_what_a_library_that_stays_requires_stays(self) -> None:
        self.requiring("root", "Mid_Dle[fast] (>=1)", "else; sys_platform == 'nowhere'", "doc; extra == 'doc'")
        self.requiring("mid.dle", "leaf", 'quick; extra == "fast"', 'slow; extra == "slow"', "root")
        self.requiring("orphan", "only-orphans")
        self.requiring("broken", "saved ~~~ rubbish [; \\", "also @ https://x/y.whl ; python_version >= '3'")
        for name in ("leaf", "quick", "slow", "else", "doc", "only-orphans", "saved", "also"):
            self.install(name, f"{name}.py")
        states = self.states("--metrics", self.counted(root=1, broken=1))
        used, required = {"root", "broken"}, {"mid-dle", "leaf", "quick", "saved", "also"}
        self.assertEqual({name for name, state in states.items() if state == "used"}, used)
        self.assertEqual({name for name, state in states.items() if state == "required"}, required)
        self.assertEqual(
            {name for name, state in states.items() if state == "unused"},
            {"slow", "else", "doc", "orphan", "only-orphans"},
        )

    def test_markers_are_read_as_they_were_once_written_or_without_spaces(self) -> None:
        self.requiring(
            "root",
            "old[fast]; python_implementation == 'CPython' or os.name != 'none'",
            "tight; (extra == 'x')or(python_version >= '3')",
        )
        self.requiring("old", "quick; extra == 'fast'")
        for name in ("quick", "tight"):
            self.install(name, f"{name}.py")
        states = self.states("--metrics", self.counted(root=1))
        self.assertEqual(states, {"root": "used", "old": "required", "quick": "required", "tight": "required"})

    def test_what_source_trees_and_hidden_copies_require_stays(self) -> None:
        for name in ("leaf", "new", "old", "other"):
            self.install(name, f"{name}.py")
        more = {"requires.txt": "leaf\n", "PKG-INFO": "Metadata-Version: 2.1\nName: Mine\nVersion: 1.0\n"}
        self.write(self.own, {f"mine.egg-info/{path}": text for path, text in more.items()})
        self.requiring("twice", "new")
        self.requiring("twice", "old", folder=self.folder / "shadowed")
        path = os.pathsep.join(map(str, [self.own, self.site, self.folder / "shadowed", HERE]))
        rows = self.rows("--metrics", self.counted(twice=1), PYTHONPATH=path)
        self.assertEqual(
            {name: (row["status"], row["required_by"]) for name, row in rows.items()},
            {
                "leaf": ("required", ["mine"]),
                "new": ("required", ["twice"]),
                "old": ("required", ["twice"]),
                "other": ("unused", []),
                "twice": ("used", []),
            },
        )

    def test_odd_paths_in_a_record_are_files_but_no_modules(self) -> None:
        self.write(self.folder, {"bin/tool": "#!python\n"})
        self.install("command", "command.py", f"{self.folder}/bin/tool")
        record = "dotted-1.0.dist-info/METADATA,,\ndotted-1.0.dist-info/RECORD,,\n"
        self.install("dotted", "dotted.py", record=record + "./dotted.py,,\n")
        self.install("rooted", "rooted.py", record=record + f"{self.site}/rooted.py,,\n")
        rows = self.rows("--metrics", self.counted(other=1))
        self.assertEqual(
            {name: row["reason"] for name, row in rows.items() if name != "other"},
            {
                "command": "its commands may be in use: they do not report here",
                "dotted": "has nothing to import",
                "rooted": "has nothing to import",
            },
        )

    def test_an_egg_infos_own_list_of_requirements_counts(self) -> None:
        requires = "leaf>=1\n\n[:python_version >= '3']\nnew\n\n[:python_version < '3']\nold\n\n[test]\ntester\n"
        self.install("root", "root.py", info="root-1.0.egg-info", more={"requires.txt": requires})
        (self.site / "root-1.0.egg-info/METADATA").rename(self.site / "root-1.0.egg-info/PKG-INFO")
        for name in ("leaf", "new", "old", "tester"):
            self.install(name, f"{name}.py")
        states = self.states("--metrics", self.counted(root=1))
        self.assertEqual({name for name, state in states.items() if state == "required"}, {"leaf", "new"})

    def test_libraries_that_share_a_command_stay_together(self) -> None:
        self.install("full", "full.py", "../../bin/run", source="#!/usr/bin/python\n")
        self.install("other", "other.py", "../../bin/run", source="#!/usr/bin/python\n")
        everywhere = "import popcon; popcon.setup_reporter()"
        states = self.states("--metrics", self.counted(full=1), before=everywhere)
        self.assertEqual(states, {"full": "used", "other": "required"})

    def test_libraries_that_share_a_module_stay_together(self) -> None:
        self.install("full", "shared/__init__.py", "full.py")
        self.install("skinny", "shared/__init__.py", "LICENSE")
        self.install("other", "other.py", "LICENSE")
        states = self.states("--metrics", self.counted(full=1))
        self.assertEqual(states, {"full": "used", "skinny": "required", "other": "unused"})

    def test_what_cannot_be_judged_is_shown_and_never_listed(self) -> None:
        self.install("unused", "unused.py")
        (self.folder / "bin").mkdir()
        (self.folder / "bin" / "fast").write_bytes(b"\x7fELF")
        self.install("meta")
        self.install("stubs", "thing-stubs/__init__.pyi")
        self.install("ctypes-only", "ctypes_only/libthing.so")
        self.install("starts", "starts.py", "starts.pth")
        self.install("lab", "lab.py", "../../share/jupyter/labextensions/lab/package.json")
        self.install("plug", "plug.py", more={"entry_points.txt": "[pytest11]\nplug = plug\n"})
        self.install("command", "command.py", more={"entry_points.txt": "[console_scripts]\nx = command:main\n"})
        more = {"entry_points.txt": "[console_scripts]\ny = becomes:main\n"}
        self.install("becomes", "becomes/run.py", source="from os import execvpe\nexecvpe('x', [], {})", more=more)
        self.install("plain-exec", "plain_exec.py", source="import os\nos.execv('x', [])")
        main = "import signal; signal.raise_signal(15)"
        self.install("module", "module/__main__.py", source=main)
        self.install("script", "script.py", "../../bin/scripted")
        (self.folder / "bin" / "scripted").write_text("#!/usr/bin/python\nfrom os import execvp as run\n")
        self.install("binary", "binary.py", "../../bin/fast")
        (self.folder / "bin" / "fast").write_bytes(b"\x7fELF")
        self.install("bare", "bare.py", record=None)
        editable = {"direct_url.json": json.dumps({"url": "file:///home/me/mine", "dir_info": {"editable": True}})}
        self.install("mine", "__editable__mine.py", more=editable)
        self.install("pip", "pip.py")
        self.install("jupyterlab", "jupyterlab.py")
        self.install("kept-one", "kept_one.py")
        self.install("kept-two", "kept_two.py")
        self.write(self.site, {"rubbish-1.0.dist-info/METADATA": "\0", "rubbish-1.0.dist-info/RECORD": "\0,\n"})
        metrics = self.counted(other=1)
        rows = self.rows("--metrics", metrics, "--keep", "Kept_*")
        reasons = {name: row["reason"] for name, row in rows.items() if row["status"] == "unknown"}
        nothing, command = "has nothing to import", "its commands may be in use: they do not report here"
        hosts = "belongs to what runs sessions or installs"
        self.assertEqual(
            reasons,
            {
                "meta": nothing,
                "stubs": nothing,
                "ctypes-only": nothing,
                "starts": "takes part in every start of Python",
                "lab": "extends Jupyter",
                "plug": "others may find it as a plug-in: pytest11",
                "command": command,
                "becomes": command,
                "binary": command,
                "module": "its commands may end without a report: raise_signal in __main__.py",
                "script": command,
                "bare": "has no RECORD of its files; pip did not install it",
                "mine": "editable installs are not counted",
                "pip": hosts,
                "jupyterlab": hosts,
                "kept-one": "is to be kept",
                "kept-two": "is to be kept",
            },
        )
        everywhere = "import popcon; popcon.setup_reporter()"
        rows = self.rows("--metrics", metrics, before=everywhere)
        self.assertEqual(
            [name for name, row in rows.items() if row["status"] == "unused"],
            ["command", "kept-one", "kept-two", "plain-exec", "unused"],
        )
        lost = "its commands may end without a report: "
        self.assertEqual(rows["becomes"]["reason"], lost + "execv in run.py")
        self.assertEqual(rows["script"]["reason"], lost + "execv in scripted")
        self.assertEqual(rows["binary"]["reason"], "has a command that is no Python: fast")

    def test_what_is_loaded_at_every_start_is_not_called_unused(self) -> None:
        for name in ("early", "late"):
            self.install(name, f"{name}.py")
        states = self.states("--metrics", self.counted(other=1), before="import early")
        self.assertEqual((states["early"], states["late"]), ("unknown", "unused"))

    def test_what_ipython_or_jupyter_are_told_to_load_is_not_called_unused(self) -> None:
        for name in ("drawn", "contents", "kernel", "server", "startup", "remark"):
            self.install(name, f"{name}_module.py")
        files = {
            "etc/ipython/ipython_config.py": "# such as remark_module\nc.InteractiveShellApp.matplotlib = 'drawn_module'",
            "etc/ipython/startup/50-x.py": "import startup_module",
            "etc/jupyter/jupyter_server_config.py": "c.ServerApp.contents_manager_class = 'contents_module.Manager'",
            "etc/jupyter/jupyter_server_config.d/x.json": '{"ServerApp": {"jpserver_extensions": {"server_module": true}}}',
            "share/jupyter/kernels/x/kernel.json": '{"argv": ["python", "-m", "kernel_module", "-f", "{connection_file}"]}',
        }
        self.write(self.folder, files)
        rows = self.rows("--metrics", self.counted(other=1), before=f"import sys; sys.prefix = {str(self.folder)!r}")
        named = [
            name for name, row in rows.items() if row["reason"].startswith("the configuration of IPython or Jupyter")
        ]
        self.assertEqual(named, ["contents", "drawn", "kernel", "server", "startup"])
        self.assertEqual(rows["remark"]["status"], "unused")

    def test_a_name_to_keep_that_is_not_there_is_pointed_out(self) -> None:
        self.install("alpha", "alpha.py")
        ended = self.usage("--metrics", self.counted(other=1), "--unused", "--keep", "alpa", "--keep", "x*", "y")
        said = "".join(
            f"popcon: nothing installed is called '{name}', which was to be kept\n" for name in ("alpa", "x*", "y")
        )
        self.assertEqual((ended.returncode, ended.stdout, ended.stderr), (0, "alpha\n", said))

    def test_counts_that_do_not_reach_back_make_nothing_unused(self) -> None:
        self.install("alpha", "alpha.py")
        young = self.counted(since=time.time() - 3 * 86400 - 5, other=1)
        ended = self.usage("--metrics", young, "--unused")
        self.assertEqual((ended.returncode, ended.stdout), (1, ""))
        self.assertRegex(
            ended.stderr, r"^popcon: nothing is called unused: .* since .+ only; ask for --window 3d if .*\n$"
        )
        self.assertEqual(self.usage("--metrics", young, "--unused", "--window", "3d").stdout, "alpha\n")
        shown = self.usage("--metrics", young)
        self.assertEqual(shown.returncode, 0)
        self.assertRegex(shown.stdout, r"(?m)^ +alpha .* this was counted since .+ only$")
        self.write(self.folder, {"no-start.txt": 'python_popcon_library_used{library="x"} 1\n'})
        ended = self.usage("--metrics", str(self.folder / "no-start.txt"), "--unused")
        self.assertEqual((ended.returncode, ended.stdout), (1, ""))
        self.assertIn("not known since when", ended.stderr)

    def test_what_is_cut_off_is_no_list_of_metrics(self) -> None:
        whole = Path(self.counted(alpha=1, beta=1)).read_bytes()
        length = {"Content-Length": str(len(whole))}
        for count in (10, len(whole.rpartition(b"python")[2]) + len("python")):
            part = whole[:-count]
            with Pages(lambda asked: (200, length, part)) as pages:  # noqa: B023
                ended = self.usage("--metrics", pages.url, "--unused")
            self.assertEqual((ended.returncode, ended.stdout), (1, ""))
            self.assertRegex(ended.stderr, "^popcon: http.* cannot be read: its answer is cut off\n$")
        (self.folder / "part.txt").write_bytes(whole[:-1])
        ended = self.usage("--metrics", str(self.folder / "part.txt"), "--unused")
        self.assertEqual((ended.returncode, ended.stdout), (1, ""))
        self.assertRegex(ended.stderr, "^popcon: .*part.txt is cut off: its last line does not end\n$")

    def test_of_several_exporters_in_a_file_the_youngest_tells_since_when(self) -> None:
        self.install("alpha", "alpha.py")
        old, young = (f"process_start_time_seconds {begin}\n" for begin in (1, time.time() - 3600))
        for order in (old + young, young + old):
            self.write(self.folder, {"both.txt": order + 'python_popcon_library_used{library="x"} 1\n'})
            ended = self.usage("--metrics", str(self.folder / "both.txt"), "--unused")
            self.assertEqual((ended.returncode, ended.stdout), (1, ""))

    def test_labels_add_up_names_are_normalised_and_a_sampled_count_is_at_least_one(self) -> None:
        lines = [
            "process_start_time_seconds 1e+00",
            'python_popcon_library_used{library="ruamel.yaml"} 1',
            'python_popcon_library_used{namespace="a} b\\"\u2028",library="ruamel-yaml"} 2 1700000000000',
            'python_popcon_library_used{library="rare",sublibrary="no"} 0.3',
            'python_popcon_library_used_created{library="no"} 5',
            'python_popcon_library_used{sublibrary="no"} 5',
        ]
        self.write(self.folder, {"saved.txt": "\n".join([*lines, ""])})
        rows = self.rows("--metrics", str(self.folder / "saved.txt"))
        self.assertEqual({name: row["processes"] for name, row in rows.items()}, {"rare": 1, "ruamel-yaml": 3})

    def test_the_table_fits_the_terminal_and_is_plain_when_piped(self) -> None:
        for name in ("alpha", "beta", "gamma", "delta-" + "x" * 60):
            self.install(name, f"{name}.py")
        self.install("plug", "plug.py", more={"entry_points.txt": "[a.very.long.group.name.for.a.plug-in]\nx = plug\n"})
        metrics = self.counted(alpha=1000, beta=500, private=3)
        for columns in (40, 60, 80, 200):
            lines = self.usage("--metrics", metrics, COLUMNS=str(columns)).stdout.splitlines()
            self.assertLessEqual(max(map(len, lines[:-2])), columns)
            self.assertNotIn("\33", "".join(lines))
            self.assertEqual("█" in "".join(lines), columns >= 60)
        ended = self.usage("--metrics", metrics, COLUMNS="110")
        self.assertEqual(ended.stderr, "")
        self.assertRegex(
            ended.stdout,
            r"\A(?m:^rank +library +version +processes +size\n"
            r"   1  alpha +1\.0 +1,000  █+ +\d+ B\n"
            r"   2  beta +1\.0 +500  █+▌? +\d+ B\n)",
        )

    def test_counts_below_k_are_veiled(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            self.install(name, f"{name}.py")
        metrics = self.counted(beta=4, alpha=3, gamma=5, private=1)
        shown = self.usage("--metrics", metrics, "--at-least", "5").stdout
        counts = re.findall(r"(?m)^ +\d+ +([a-z]+)(?: +1\.0)? +(\S+)", shown)
        self.assertEqual(counts, [("gamma", "5"), ("alpha", "<5"), ("beta", "<5"), ("private", "<5")])
        rows = self.rows("--metrics", metrics, "--at-least", "5")
        self.assertEqual(
            {name: row["processes"] for name, row in rows.items()},
            {"alpha": None, "beta": None, "gamma": 5, "private": None},
        )
        self.assertEqual({row["status"] for row in rows.values()}, {"used", "absent"})

    @unittest.skipUnless(hasattr(os, "openpty"), "needs os.openpty")
    def test_colour_and_progress_are_for_terminals(self) -> None:
        self.install("alpha", "alpha.py")
        metrics = self.counted(alpha=3)

        def seen(stream: str, code: str, **settings: str) -> str:
            """What a terminal gets on the stream when code runs."""
            leader, follower = os.openpty()
            self.addCleanup(os.close, leader)
            streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: follower}
            environ = clean_environ(PYTHONPATH=os.pathsep.join([str(self.site), str(HERE)]), TERM="xterm", **settings)
            command = [sys.executable, "-S", "-c", code, "usage", "--metrics", metrics]
            subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, timeout=60, **streams)
            os.close(follower)
            text = b""
            with contextlib.suppress(OSError):  # its end
                while chunk := os.read(leader, 4096):
                    text += chunk
            return text.decode()

        code = "import popcon; popcon.main()"
        self.assertIn("\33[1mrank", seen("stdout", code))
        for settings in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
            environ = {"TERM": "xterm"} | settings
            self.assertNotIn("\33", seen("stdout", f"import os; os.environ.update({environ}); {code}"))
        self.assertEqual(seen("stderr", code), "")
        slow = "import popcon, time; popcon.load_command_line(); judged = popcon.judged; popcon.judged = lambda *given: time.sleep(1.5) or judged(*given); popcon.main()"
        self.assertRegex(seen("stderr", slow), r"^(\r\x1b\[Kreading what is installed \.\.\.)+\r\x1b\[K$")
        self.assertEqual(seen("stderr", f"import os; os.environ['TERM'] = 'dumb'; {slow}"), "")

    def test_odd_answers_get_one_sentence_and_no_traceback(self) -> None:
        def series(*labels: Any, **more: Any) -> bytes:
            return json.dumps({"status": "success", "data": labels} | more).encode()

        def result(**series: Any) -> bytes:
            return json.dumps({"status": "success", "data": {"result": [series]}}).encode()

        good = {"library": "alpha"}
        page = b"<!DOCTYPE html><title>Log in</title>"
        answers: list[tuple[Any, str]] = [  # what is answered to a question for the series, and to others
            (
                (302, {"Location": "https://login.example/\33[2J"}, b""),
                r"redirects to https://login.example/ \[2J; .*--header",
            ),
            ((200, {}, page), "does not answer as Prometheus does, but '<!DOCTYPE html>"),
            ((200, {}, b""), "does not answer as Prometheus does"),
            ((200, {}, series(good)[:-2]), "does not answer as Prometheus does"),
            ((200, {}, b"[1, 2]"), "does not answer as Prometheus does"),
            ((200, {}, b"[" * 100000), "does not answer as Prometheus does"),
            ((200, {"Content-Length": "9"}, b"{"), "cannot be read: its answer is cut off$"),
            ((200, {}, series(5)), "does not answer as Prometheus does"),
            ((200, {}, series({"library": 5}, {"library": [good]})), "does not answer as Prometheus does"),
            ((200, {}, series({"library": 5}), result()), "does not answer as Prometheus does"),
            ((200, {}, series(good), result(metric=good, value=[1, "NaN"])), "does not answer as Prometheus does"),
            ((200, {}, series(good), b'{"data": {"result": []}}'), "no count of .* rose"),
            ((200, {}, series()), "there is no counter python_popcon_library_used"),
            (
                (200, {}, series(good, warnings=["a store was unreachable"])),
                "does not know all: a store was unreachable",
            ),
            (
                (400, {}, b'{"status":"error","error":"parse error: unexpected"}'),
                "answers 400 .*: parse error: unexpected",
            ),
            ((401, {}, page), "answers 401 Unauthorized$"),
            ((404, {}, b"404 page not found"), "api/v1/series answers 404 Not Found$"),
            ((503, {}, b"[]"), "answers 503 Service Unavailable$"),
            ((503, {}, b"[" * 60000), "answers 503 Service Unavailable$"),
            ((503, {"Transfer-Encoding": "chunked"}, b"no size"), "answers 503 Service Unavailable$"),
        ]
        for answer, said in answers:

            def answered(asked: str, answer: Any = answer) -> Any:
                return *answer[:2], answer[2 if "/series" in asked else -1]

            with self.subTest(answer=answer), Pages(answered) as pages:
                ended = self.usage("--prometheus", pages.url)
                self.assertEqual((ended.returncode, ended.stdout), (1, ""))
                self.assertRegex(ended.stderr, r"^popcon: [^\n]*\n$")
                self.assertRegex(ended.stderr.rstrip("\n"), said)
        with Server() as dead, Pages(lambda asked: (200, {}, page)) as pages:
            for source, said in [
                (("--prometheus", f"http://127.0.0.1:{dead.port}"), "cannot be read: .*refused"),
                (("--prometheus", "http://no-such-host.invalid"), "cannot be read: "),
                (("--metrics", f"http://127.0.0.1:{dead.port}/metrics"), "cannot be read: .*refused"),
                (("--metrics", pages.url), "is no list of metrics, but begins '<!DOCTYPE html>"),
                (("--metrics", "/no/such/file"), "No such file"),
                (("--metrics", "http://[::1"), "cannot be read: Invalid IPv6 URL"),
                (("--metrics", "/"), "Is a directory"),
                (("--metrics", self.counted(), "--metric", "other"), "there is no counter other in /"),
                (("--metrics", self.counted(alpha=0)), "no count of python_popcon_library_used rose"),
            ]:
                with self.subTest(source=source):
                    ended = self.usage(*source, "--json")
                    self.assertEqual((ended.returncode, ended.stdout), (1, ""))
                    self.assertRegex(ended.stderr, r"^popcon: [^\n]*\n$")
                    self.assertRegex(ended.stderr, said)
        ended = self.usage("--metrics", self.counted(alpha=1), PYTHON_POPCONTEST_STATSD_PREFIX="a b")
        self.assertEqual(ended.returncode, 1)
        self.assertRegex(ended.stderr, "^popcon: PYTHON_POPCONTEST_STATSD_PREFIX='a b': must be words")

    def test_no_clock_of_a_server_and_no_closed_stream_is_a_traceback(self) -> None:
        self.install("alpha", "alpha.py")
        for since in (1e300, -1e300):
            ended = self.usage("--metrics", self.counted(since=since, x=1))
            self.assertEqual((ended.returncode, "Traceback" in ended.stderr), (0, False))
        metrics = self.counted(x=1)
        ended = self.usage("--metrics", metrics, "--keep", "y", "--unused", before="import sys; sys.stderr = None")
        self.assertEqual((ended.returncode, ended.stdout, ended.stderr), (0, "alpha\n", ""))
        ended = self.usage("--metrics", metrics, before="import sys; sys.stdout = None")
        self.assertEqual((ended.returncode, ended.stderr), (1, "popcon: stdout is closed\n"))

    def test_it_says_whose_imports_are_known_and_since_when(self) -> None:
        self.install("alpha", "alpha.py")
        self.install("beta", "beta.py")
        metrics = self.counted(beta=1)
        everywhere = "import popcon; popcon.setup_reporter()"
        for before, who, note in (("", "No session", self.SESSIONS_ONLY), (everywhere, "Nobody", "")):
            ended = self.run_usage("--metrics", metrics, before=before)
            self.assertEqual((ended.returncode, ended.stderr), (0, note))
            first, second = ended.stdout.splitlines()[-2:]
            self.assertRegex(first, r"^1 of 2 libraries can go, \d+ B of \d+ B\.$")
            self.assertEqual(second, f"{who} has imported them since 1970-01-01, and nothing that stays needs them.")
        ended = self.run_usage("--metrics", self.counted(alpha=1, beta=1))
        self.assertEqual((ended.stdout.splitlines()[-1], ended.stderr), ("Counted since 1970-01-01.", ""))
        Path(metrics).write_text('python_popcon_library_used{library="beta"} 1\n')
        ended = self.run_usage("--metrics", metrics)
        self.assertRegex(ended.stderr, "^popcon: nothing is called unused: it is not known since when")
        self.assertRegex(ended.stdout.splitlines()[-1], "^0 of 2 libraries can go")

    def test_a_sample_is_pointed_out(self) -> None:
        self.install("alpha", "alpha.py")
        ended = self.usage("--metrics", self.counted(x=1), "--unused", PYTHON_POPCONTEST_STATSD_SAMPLE_RATE="0.1")
        said = "popcon: a sample of 0.1 of the processes reports: rare uses may be missed\n"
        self.assertEqual((ended.returncode, ended.stdout, ended.stderr), (0, "alpha\n", said))

    def test_wrong_usage_gets_one_sentence_and_the_usage(self) -> None:
        metrics = ("--metrics", "x")
        prometheus = ("--prometheus", "http://127.0.0.1:9")
        for arguments, said in [
            ((), "one of the arguments --prometheus --metrics is required"),
            ((*metrics, *prometheus), "not allowed with argument"),
            (("--prometheus", "prometheus:9090"), "must be http://HOST:PORT"),
            (("--prometheus", "ftp://x"), "must be http://HOST:PORT"),
            (("--prometheus", "http://me:secret@x"), "must be http://HOST:PORT"),
            ((*metrics, "--unused", "--json"), "not allowed with argument"),
            ((*metrics, "--match", "{}x"), "must be label matchers"),
            ((*metrics, "--match", "{a='b'}"), "--match is for --prometheus"),
            ((*metrics, "--at-least", "few"), "invalid int value"),
            *(
                ((*metrics, "--window", text), "'.*' must be a duration such as 90d")
                for text in ("", "90", "d", "1.5d", "0s", "5 d", "9999y")
            ),
        ]:
            with self.subTest(arguments=arguments):
                ended = self.usage(*arguments)
                self.assertEqual((ended.returncode, ended.stdout), (2, ""))
                self.assertRegex(ended.stderr, rf"(?s)^usage: .*error: .*{said}")

    def test_durations_are_read_as_promql_reads_them(self) -> None:
        for text, seconds in [("90d", 90 * 86400), ("1h30m", 5400), ("1w", 604800), ("1y", 31536000), ("1500ms", 1.5)]:
            self.assertEqual(command_line.seconds(text), seconds)

    def test_the_name_of_the_counters_follows_from_the_prefix(self) -> None:
        for prefix, metric in [
            ("python_popcon.library_used", "python_popcon_library_used"),
            ("python_popcon.namespace.prod.library_used", "python_popcon_library_used"),
            ("a.b-c", "a_b_c"),
            ("namespace", "namespace"),
            ("a.namespace", "a_namespace"),
        ]:
            self.assertEqual(command_line.metric_name(prefix), metric)

    def test_a_header_is_sent_and_never_told(self) -> None:
        secret = "Bearer hunter2"
        answers = {"elsewhere": (302, {"Location": "http://127.0.0.1:9/"}, b"")}
        with Pages(lambda asked: answers.get("elsewhere", (404, {}, b""))) as pages:
            variable = {"PYTHON_POPCONTEST_PROMETHEUS_HEADER": f"Authorization: {secret}"}
            for given, settings in [(("--header", f"Authorization: {secret}"), {}), ((), variable)]:
                ended = self.usage(
                    "--prometheus", f"{pages.url}/tenant/", "--header", "X-Scope-OrgID: a", *given, **settings
                )
                ((path, headers),) = pages.asked
                pages.asked.clear()
                self.assertTrue(path.startswith("/tenant/api/v1/series?match%5B%5D="), path)
                self.assertEqual((headers["Authorization"], headers["X-Scope-Orgid"]), (secret, "a"))
                self.assertNotIn("hunter2", ended.stderr)
            for text in ("hunter2", "Authorization hunter2", "X: hunter2\nY: 1", "X: hunter2\u20ac", "a b: hunter2"):
                for given, settings in [(("--header", text), {}), ((), {"PYTHON_POPCONTEST_PROMETHEUS_HEADER": text})]:
                    ended = self.usage("--prometheus", pages.url, *given, **settings)
                    self.assertEqual(ended.returncode, 1)
                    self.assertRegex(ended.stderr, "^popcon: a header must read 'Name: value', .*\n$")
                    self.assertNotIn("hunter2", ended.stderr)
            self.assertEqual(pages.asked, [])

    def test_a_life_of_one_sample_counts_where_ranges_leave_out_their_begin(self) -> None:
        exporter = frozenset({"job": "popcon", "instance": "x"}.items())
        starts = [(3.0, 1.0), (5.0, 1.0), (13.0, 11.0), (15.0, 11.0), (23.0, 21.0)]
        once, thrice = (exporter | {("library", name)} for name in ("once", "thrice"))
        counted = {once: [(23.0, 1.0)], thrice: [(time, 1.0) for time, _ in starts]}

        def ask(what: str, query: str = "", **when: Any) -> dict[Any, list[tuple[float, float]]]:
            """What Prometheus 3 answers."""
            if what == "series":
                return {labels: [] for labels in counted}
            (reach,) = (int(text) / 1000 for text in re.findall(r"\[(\d+)ms\]", query))
            series = {exporter: starts} if "process_start" in query else counted
            step = when.get("step", 1)
            times = [when["time"]] if "time" in when else [when["start"] + step * count for count in range(503)]
            found = {
                labels: [(time, [s for s in samples if time - reach < s[0] <= time]) for time in times]
                for labels, samples in series.items()
            }
            if query.startswith("process_start"):
                return {labels: seen[0][1] for labels, seen in found.items() if seen[0][1]}
            last = {labels: [(time, s[-1][1]) for time, s in seen if s] for labels, seen in found.items()}
            return {labels: samples for labels, samples in last.items() if samples}

        with contextlib.redirect_stderr(io.StringIO()):
            counts, _ = command_line.counts_in_prometheus(ask, "x", "", 0.0, 40.0)
        self.assertEqual(counts, {"once": 1, "thrice": 3})

    def test_ten_thousand_series_are_added_up(self) -> None:
        exporters: list[dict[str, Any]] = [
            {"job": "popcon", "instance": f"10.0.0.{number}:9102"} for number in range(10)
        ]
        series: list[dict[str, Any]] = [
            {"metric": exporter | {"__name__": "x", "library": f"library-{number}"}, "value": [1, "2"]}
            for number in range(1000)
            for exporter in exporters
        ]
        now = time.time()

        def answer(asked: str) -> tuple[int, dict[str, str], bytes]:
            form = dict(urllib.parse.parse_qsl(asked.partition("?")[2]))
            found: list[dict[str, Any]] = []
            if "match[]" in form:
                body = {"data": [one["metric"] for one in series]}
                return 200, {}, json.dumps(body).encode()
            if "process_start_time" in form["query"]:
                start = float(form["start"])
                found = [{"metric": exporter, "values": [[start, "5"], [now, "5"]]} for exporter in exporters]
            elif "count(" in form["query"]:
                found = [{"metric": {}, "values": [[form["start"], "1"]]}]
            elif float(form["time"]) > now:
                found = [one for one in series if f'"{one["metric"]["instance"]}"' in form["query"]]
            return 200, {}, json.dumps({"status": "success", "data": {"result": found}}).encode()

        with Pages(answer) as pages:
            rows = self.rows("--prometheus", pages.url)
        self.assertEqual(rows.keys(), {f"library-{number}" for number in range(1000)})
        self.assertEqual({row["processes"] for row in rows.values()}, {20})

    @unittest.skipUnless(
        EXPORTER and PROMETHEUS,
        "needs POPCON_TEST_STATSD_EXPORTER and POPCON_TEST_PROMETHEUS, the paths of statsd_exporter and prometheus",
    )
    def test_the_real_prometheus_gives_exact_counts_whatever_restarts(self) -> None:
        names = ("before", "again", "once", "twice", "everywhere", "spaces", "never")
        for name in names:
            self.install(name, f"{name}.py")
        rules = "mappings:" + "".join(mapping.removeprefix("mappings:") for mapping in readme_mappings())

        def use(settings: dict[str, Any], *libraries: str, space: str = "") -> None:
            prefix = f"python_popcon.namespace.{space}.library_used" if space else ""
            code = f"import popcon; popcon.setup_reporter(); import {', '.join(libraries)}"
            ended = self.run_python(code, PYTHON_POPCONTEST_STATSD_PREFIX=prefix, **settings)
            self.assertEqual((ended.returncode, ended.stderr), (0, ""))

        with contextlib.ExitStack() as stack:
            other, other_metrics = stack.enter_context(self.exporter(rules))
            with self.exporter(rules) as (first, metrics):
                prometheus = stack.enter_context(self.prometheus(metrics.url, other_metrics.url))
                use(first, "before", "again")
                use(first, "before", space="prod")
                self.wait_for_scrapes(prometheus)
                start = time.time()
                time.sleep(2)  # for by then the commands below will not have looked so far back
                use(first, "again", "once", "twice", "everywhere")
                use(other, "everywhere")
                use(first, "spaces", space="prod")
                use(first, "spaces", space="test")
                use(first, "spaces", space="test")
                self.wait_for_scrapes(prometheus)
                seconds = f"{(time.time() - start) * 1000:.0f}ms"
                expected = {"again": 1, "once": 1, "twice": 1, "everywhere": 2, "spaces": 3}
                for query, rest in zip(readme_blocks("promql"), ({"before": 0}, {}), strict=True):
                    self.assertEqual(self.queried(prometheus, query.replace("30d", seconds)), expected | rest)
                places = (
                    int(first["PYTHON_POPCONTEST_STATSD_PORT"]),
                    int(metrics.url.rpartition(":")[2].partition("/")[0]),
                )
            with self.exporter(rules, places):
                self.wait_for_scrapes(prometheus)
                use(first, "twice")
                self.wait_for_scrapes(prometheus)
                window = ("--prometheus", prometheus, "--window", f"{(time.time() - start) * 1000:.0f}ms")
                rows = self.rows(*window)
                counts = {name: row["processes"] for name, row in rows.items()}
                self.assertEqual(
                    counts, {"before": 0, "never": 0, "again": 1, "once": 1, "twice": 2, "everywhere": 2, "spaces": 3}
                )
                self.assertEqual(self.usage(*window, "--unused").stdout, "before\nnever\n")
                prod = self.rows(*window, "--match", '{namespace="prod"}')
                self.assertEqual({name for name, row in prod.items() if row["processes"]}, {"spaces"})
                self.assertEqual(prod["spaces"]["processes"], 1)
                # Where a Prometheus does not keep what tells of restarts, rather too much is counted.
                ask = command_line.prometheus(prometheus, {})
                with contextlib.redirect_stderr(io.StringIO()) as stderr:
                    forgetful = command_line.counts_in_prometheus(
                        lambda what, **form: {} if "process_start" in form.get("query", "") else ask(what, **form),
                        "python_popcon_library_used",
                        "",
                        start,
                        time.time(),
                    )
                self.assertEqual(forgetful[0].keys(), counts.keys() - {"never"})
                self.assertTrue(all(forgetful[0][name] >= max(1, counts[name] - 1) for name in forgetful[0]))
                self.assertIn("process_start_time_seconds", stderr.getvalue())
                # All there is, for people who ask for more than that.
                ended = self.usage("--prometheus", prometheus, "--unused")
                self.assertEqual((ended.returncode, ended.stdout), (1, ""))
                (shorter,) = re.findall(r"ask for --window (\w+) if", ended.stderr)
                ended = self.usage("--prometheus", prometheus, "--unused", "--window", shorter)
                self.assertEqual((ended.returncode, ended.stderr), (0, ""))
                self.assertIn("never\n", ended.stdout)
                for arguments, said in [
                    (("--match", "{namespace=prod}"), "answers 400 .*: .*parse error"),
                    (
                        ("--match", '{namespace="nowhere"}'),
                        "there is no counter python_popcon_library_used that matches",
                    ),
                    (("--metric", "python_popcon"), "there is no counter python_popcon "),
                ]:
                    ended = self.usage(*window, *arguments, "--unused")
                    self.assertEqual((ended.returncode, ended.stdout), (1, ""))
                    self.assertRegex(ended.stderr, rf"^popcon: [^\n]*{said}[^\n]*\n$")
                # Its own metrics, as they are now.
                ended = self.usage("--metrics", metrics.url, "--json")
                self.assertEqual(
                    {row["library"]: row["processes"] for row in json.loads(ended.stdout) if row["processes"]},
                    {"twice": 1},
                )

    @contextlib.contextmanager
    def prometheus(self, *targets: str) -> Iterator[str]:
        """The real Prometheus, which fetches each second from the targets: its address."""
        hosts = [target.split("/")[2] for target in targets]
        config = {
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "popcon", "static_configs": [{"targets": hosts}]}],
        }
        self.write(self.folder, {"prometheus.yml": json.dumps(config)})  # which is YAML, too
        with socket.create_server(("127.0.0.1", 0)) as tcp:
            address = f"127.0.0.1:{tcp.getsockname()[1]}"
        command = [
            PROMETHEUS,
            f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address={address}",
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield f"http://{address}"
        finally:
            process.kill()
            process.wait()

    def queried(self, prometheus: str, query: str) -> dict[str, float]:
        """The value for each library."""
        url = f"{prometheus}/api/v1/query?query={urllib.parse.quote(query)}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            found = json.load(answer)["data"]["result"]
        return {series["metric"].get("library", ""): float(series["value"][1]) for series in found}

    def wait_for_scrapes(self, prometheus: str, targets: int = 2) -> None:
        """Wait until it has fetched from all its targets what they show by now."""
        begin = time.time()
        while time.time() < begin + 30:
            time.sleep(0.3)
            with contextlib.suppress(OSError):
                fetched = f"count(timestamp(up) > {begin + 0.5} and up == 1) == {targets}"
                if self.queried(prometheus, fetched):
                    return
        self.fail("Prometheus does not fetch")

    @unittest.skipUnless(LARGE, "needs POPCON_TEST_LARGE, the python of an environment with packaging")
    def test_nothing_that_stays_needs_what_can_go_in_a_large_environment(self) -> None:
        used = {
            "pandas": 3,
            "scikit-learn": 2,
            "matplotlib": 1,
            "requests": 1,
            "google-cloud-storage": 1,
            "ruamel-yaml": 1,
            "spacy": 1,
        }

        def run(*arguments: str) -> str:
            command = [LARGE, "-W", "ignore", *arguments]
            ended = subprocess.run(
                command, env=clean_environ(), cwd=self.own, timeout=60, text=True, capture_output=True, check=True
            )
            self.assertIn(ended.stderr, ("", self.SESSIONS_ONLY))
            return ended.stdout

        lists = []
        for before in ("pass", "import popcon; popcon.setup_reporter()"):
            tell = ["-c", f"{before}; import popcon; popcon.main()", "usage", "--metrics", self.counted(**used)]
            unused = run(*tell, "--unused").split()
            self.assertGreater(len(unused), 20)
            rows = json.loads(run(*tell, "--json"))
            self.assertEqual([row["library"] for row in rows if row["status"] == "unused"], unused)
            self.assertGreater(len(rows), 500)
            lists.append(unused)
        self.assertLess(set(lists[0]), set(lists[1]))  # where every process reports, commands can be judged
        checked = json.loads(run("-c", STAYS, json.dumps(lists)))
        self.assertEqual(checked, {"needed": [], "failed": []})


def readme_blocks(language: str) -> list[str]:
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return [
        textwrap.dedent(block)
        for block in re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    ]


def readme_mappings() -> list[str]:
    """README's mapping rules: the plain one, and the one with a namespace."""
    return [block for block in readme_blocks("yaml") if block.startswith("mappings:")]


class TestReadme(Case):
    def test_its_startup_file_reports_and_is_silent_without_popcon(self) -> None:
        self.install("alpha", "alpha.py")
        (startup,) = (block for block in readme_blocks("python") if "ImportError" in block)
        with Server() as server:
            result = self.run_python(startup + "import alpha", **server.settings)
            self.assertEqual(server.received(), [b"python_popcon.library_used.alpha:1|c"])
        without = self.run_python(startup, PYTHONPATH="")
        for ended in (result, without):
            self.assertEqual((ended.returncode, ended.stdout, ended.stderr), (0, "", ""))

    def test_its_commands_run(self) -> None:
        shell = readme_blocks("sh")
        self.assertIn("python -m popcon selftest\npython -m unittest\n", shell)
        (program,) = re.findall("python -m popcon run (.*)\n", "".join(shell))
        ended = self.run_python("", "-m", "popcon", "run", *shlex.split(program))
        self.assertEqual((ended.returncode, ended.stdout), (0, ""))
        self.assertRegex(ended.stderr, "(?m)^json +not counted: standard library$")
        for line in re.findall("python -m popcon usage (.*)\n", "".join(shell)):
            with Pages(lambda asked: (200, {}, b'{"data": []}')) as pages:
                arguments = shlex.split(line.partition(" >")[0].replace("http://prometheus:9090", pages.url))
                ended = self.usage(*arguments)
            self.assertEqual((ended.returncode, ended.stdout), (1, ""))
            self.assertIn("there is no counter python_popcon_library_used in the last 90d", ended.stderr)

    def test_names_every_setting_with_its_default(self) -> None:
        text = (HERE / "README.md").read_text(encoding="utf-8")
        for name, (default, _) in popcon.SETTINGS.items():
            self.assertRegex(text, rf"\| *`{name}` *\|.*{re.escape(default)}")
            self.assertIn(name, popcon.__doc__ or "")
        for name in ("PYTHON_POPCONTEST_DEBUG", "DO_NOT_TRACK", command_line.HEADER):
            self.assertRegex(text, rf"\| *`{name}` *\|")
            self.assertIn(name, popcon.__doc__ or "")

    def test_python_in_it_compiles(self) -> None:
        blocks = readme_blocks("python")
        self.assertGreaterEqual(len(blocks), 2)
        for block in blocks:
            compile(block, "README.md", "exec")

    @unittest.skipUnless(YAML, "needs POPCON_TEST_PYTHON_YAML, a python that can import yaml")
    def test_yaml_in_it_is_valid_and_the_helm_values_hold_the_mapping(self) -> None:
        code = "import json, sys, yaml; print(json.dumps([yaml.safe_load(block) for block in json.load(sys.stdin)]))"

        def load(blocks: list[str]) -> list[Any]:
            out = subprocess.run(
                [YAML, "-c", code], input=json.dumps(blocks), capture_output=True, text=True, check=True
            ).stdout
            return json.loads(out)  # type: ignore[no-any-return]

        documents = load(readme_blocks("yaml"))
        plain = {
            "mappings": [
                {
                    "match": "python_popcon.library_used.*",
                    "name": "python_popcon_library_used",
                    "labels": {"library": "$1"},
                }
            ]
        }
        self.assertIn(plain, documents)
        helm = [document["statsd"]["mappingConfig"] for document in documents if "statsd" in document]
        self.assertEqual(load(helm), [plain])
        hub = [
            config for document in documents if "hub" in document for config in document["hub"]["extraConfig"].values()
        ]
        self.assertTrue(hub)
        for config in hub:
            spawner = types.SimpleNamespace(environment={})
            with mock.patch.dict(os.environ, {"POD_NAMESPACE": "prod"}):
                exec(config, {"c": types.SimpleNamespace(KubeSpawner=spawner)})
            self.assertEqual(
                spawner.environment["PYTHON_POPCONTEST_STATSD_PREFIX"], "python_popcon.namespace.prod.library_used"
            )
            with mock.patch.dict(os.environ, spawner.environment):
                for name in popcon.SETTINGS:
                    popcon.setting(name)


if __name__ == "__main__":
    unittest.main()
