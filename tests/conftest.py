"""Setup of all tests: four virtual CPU devices, strict promotion, run-time type checks, a shared compile cache."""

import atexit
import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from object_store import ObjectStore


def set_environment() -> None:
    """Set before JAX is imported, and inherited by the commands that tests start."""
    flags = ["xla_force_host_platform_device_count=4"]
    # Compiling takes most of the suite's time; tiny models do not benefit from LLVM's optimiser (27 s -> 12 s a step)
    # or from XLA's newer emitters of fused loops (11 s -> 6 s).
    flags += ["xla_backend_optimization_level=0", "xla_llvm_disable_expensive_passes=true"]
    # Removed during jaxlib 0.11; XLA aborts the process on a flag that it does not know.
    if tuple(int(part) for part in version("jaxlib").split(".")[:2]) < (0, 11):
        flags += ["xla_cpu_use_fusion_emitters=false"]
    os.environ["XLA_FLAGS"] = " ".join(f"--{flag}" for flag in flags)
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA's thread pool: with one thread per core, four virtual devices on two cores can deadlock.
    os.environ["NPROC"] = "16"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = tempfile.mkdtemp(prefix="flowdit-test-cache-")
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


set_environment()

import jax
import jaxtyping

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def modules_with_shapes() -> list[str]:
    """The modules that annotate arrays. Checks of the others cost a tenth of the suite, and pyright does them."""
    root = Path(__file__).parents[1]
    files = [file for file in (root / "flowdit").rglob("*.py") if "jaxtyping" in file.read_text()]
    return [".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for file in files]


jaxtyping.install_import_hook(modules_with_shapes(), "beartype.beartype")
gc.disable()  # until all tests are imported


def pytest_configure(config: pytest.Config) -> None:
    # OmegaConf's annotations, which beartype sees through `DictConfig`.
    config.addinivalue_line("filterwarnings", "ignore:.*deprecated by PEP 585.*")


def pytest_collection_finish() -> None:
    """Spare the garbage collector the objects that stay, and let it run less often: it took a tenth of the suite."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Forget compiled functions after a module if they have grown to gigabytes; the cache of files has them."""
    yield
    statistics = Path("/proc/self/statm")
    if statistics.exists() and int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 2.5 * 2**30:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of random latents for the embedded VAE. Tests that change it work on a copy."""
    from runs import write_tiny_data

    return write_tiny_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def server() -> Iterator["ObjectStore"]:
    """An S3 server."""
    from object_store import ObjectStore

    store = ObjectStore()
    yield store
    store.stop()


@pytest.fixture
def store(server, tmp_path, monkeypatch) -> "ObjectStore":
    """The server, found by the variables of the environment, with an empty bucket."""
    for name, value in {**server.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    server.before = lambda path: None
    server.is_busy = False
    server.files.rm(server.files.find("bucket")) if server.files.find("bucket") else None
    return server


@pytest.fixture(scope="session")
def whole_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, uninterrupted run with checkpoints 2, 4 and 6. Tests that change it work on a copy."""
    from runs import train_here

    run = tmp_path_factory.mktemp("runs") / "whole"
    finished = train_here(tiny_data, run)
    assert finished.status == 0, finished.err
    return run


@pytest.fixture(scope="session")
def whole_text_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, uninterrupted run of stage 2, with checkpoints 2, 4 and 6."""
    from runs import train_text_here

    run = tmp_path_factory.mktemp("text") / "whole"
    finished = train_text_here(tiny_data, run)
    assert (finished.status, finished.err) == (0, "")
    assert "captions, wordllama features of 256 x 32 tokens online" in finished.out
    assert (
        "compute in float32; the layers of models.fast, with their own attention (model.kernels=auto)" in finished.out
    )
    return run


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What flowdit has logged in this test, oldest first."""
    caplog.set_level(logging.INFO, "flowdit")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("flowdit")]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative default paths such as `checkpoints` must not be created in the repository."""
    monkeypatch.chdir(tmp_path)
