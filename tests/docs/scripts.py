"""Scripts of examples/ that the documents show: arguments, what they print, and what runs them."""

from __future__ import annotations

from dataclasses import dataclass

HERE = "tests/docs/test_scripts.py"


@dataclass(frozen=True)
class Run:
    """Processes that are started at the same time, in the folder of the first script."""

    scripts: tuple[str, ...]
    """Each with its arguments."""
    prints: tuple[tuple[str, ...], ...]
    """Lines that each of them prints, in this order, among others."""
    needs: str = ""
    """A module that the tests may lack."""

    @property
    def paths(self) -> list[str]:
        """The files below examples/."""
        folder = self.scripts[0].rpartition("/")[0]
        return [f"{folder}/{script.split()[0].rpartition('/')[2]}" for script in self.scripts]


WAITS = "waiting up to 600 s for the other program"
RUNS = (
    Run(("guide/options.py",), (("backend shm",),)),
    Run(("guide/linking.py",), (("OK (2,)",),)),
    Run(
        ("guide/own_caches.py",),
        (("LLMStatusCode.LLM_NOT_YET_LINK", "0x5010b007"),),
    ),
    Run(("guide/torch_tensors.py",), ((),), "torch"),
    Run(("guide/pulling.py",), ((),)),
    Run(("guide/granting.py",), ((),)),
    Run(("guide/pushing.py",), ((),)),
    Run(("guide/background.py",), ((),)),
    Run(("guide/messages.py",), (("1 b'request 7 is yours'",),)),
    Run(("guide/by_address.py",), ((),)),
    Run(("guide/metrics.py 0",), ((),), "prometheus_client"),
    Run(
        ("prompt_decoder/prompt.py", "decoder.py"),
        (
            (WAITS, "request 1: CONSUMED", "request 2: CONSUMED", "request 3: CONSUMED"),
            (
                WAITS,
                "request 1 is here, in blocks [0]",
                "request 2 is here, in blocks [0, 1]",
                "request 3 is here, in blocks [0, 1, 2]",
            ),
        ),
    ),
    Run(
        ("layer_by_layer/layers.py 1", "layers.py 2"),
        ((WAITS, "sent 8 layers"), (WAITS, "8 layers of two blocks are here")),
    ),
)

RUN_BY = {f"examples/{path}": HERE for run in RUNS for path in run.paths} | {
    "examples/first/first.py": "tests/test_readme.py",
    "examples/overlap/overlap_asyncio.py": "tests/test_examples.py",
    "examples/overlap/overlap_world.py": "tests/test_examples.py",
    "examples/several_hosts/move.py": "tests/test_several_hosts.py",
    "examples/serving/tests/test_linked_by_table.py":
        "integrations/pytest/tests/test_pytest_sample.py",
}  # fmt: skip
"""By which test each script is run."""
