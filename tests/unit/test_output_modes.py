"""Every file and folder that a command writes has the permissions of the umask."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from stages import options, run

from infir2.convert import hf


@pytest.fixture
def umask() -> Iterator[int]:
    """One that no default has: the group reads, others do not."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_all_outputs_follow_the_umask(
    world: Path, tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server under another user, or the group's next stage, reads what a command wrote."""
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)  # several files per model
    out = tmp_path / "out"
    out.mkdir()
    run(options(world, out / "run", "cpt", schedule__total_steps=4))
    for words in (
        f"export hf {out}/run --to {out}/hf",
        f"export fp8 {out}/run --to {out}/fp8",
        f"export megatron {out}/run --to {out}/megatron",
        f"import hf {out}/hf --to {out}/from-hf",
        f"import fp8 {out}/fp8 --to {out}/from-fp8",
        f"import megatron {out}/megatron --to {out}/from-megatron --like {out}/hf",
        f"tokenize {world}/cpt.jsonl --tokenizer {world}/tokenizer --out {out}/tokens/cpt",
        f"report {out}/run --to {out}/report.html",
    ):
        run(words.split())
    assert len(list(out.glob("*/model-0*-of-*.safetensors"))) > 8
    wrong = {}
    for path in (out, *out.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask:
            wrong[str(path.relative_to(out))] = oct(mode)
    assert not wrong
