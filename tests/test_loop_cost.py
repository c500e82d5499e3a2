"""What a loop costs, counted by hand; the recorded table; and what a call asks of its tile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import compile_check, loop_cost
from bench.compile_cases import TABLE_FEATURES, TABLE_SIZES, Case
from bench.compile_check import Result
from bench.loop_cost import Cost, Loop, loops, recorded, traffic, why_dearer
from bench.rows import ROOT
from kernels.attention.call import TENSORS, Call
from kernels.attention.tiles import ASKED, choose_tile, column_blocks, what_is_asked

# Two loops with products, one inside a loop over heads, and one that only loads; the first is the steady one.
CODE = """
.L_x_9:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0020*/                   FFMA R1, R2, R3, R4 ;
        /*0030*/              @!P0 FMNMX R1, R2, R3, !PT ;
        /*0040*/                   MUFU.EX2 R1, R1 ;
        /*0050*/                   IMAD.WIDE R2, R3, 0x4, R4 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0080*/                   STL [R1], R2 ;
        /*0090*/                   FSEL R1, R2, R3, P0 ;
        /*00a0*/                   FSEL R1, R2, R3, P0 ;
        /*00b0*/                   FSEL R1, R2, R3, P0 ;
        /*00c0*/                   MUFU.EX2 R1, R1 ;
        /*00d0*/               @P1 BRA `(.L_x_2) ;
        /*00e0*/               @P2 BRA `(.L_x_9) ;
.L_x_3:
        /*00f0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0100*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0110*/               @P1 BRA `(.L_x_3) ;
.L_x_4:
        /*0120*/                   BRA `(.L_x_4);
"""


def cost_of(text: str, **changed: object) -> Cost:
    arguments = {"kernel": "forward_kernel", "size": 16, "block_q": 128, "block_k": 64, "num_warps": 8, "arch": 90}
    found = loop_cost.loop_cost(text, **{**arguments, **changed})
    assert found is not None
    return found


def test_a_loop_by_hand() -> None:
    assert [loop.issue for loop in loops(CODE)] == [6, 7, 3]  # the innermost ones
    steady = next(loops(CODE))
    assert steady.flops == 2 * 64 * 128 * 16 / 4 and steady.spilled == 0
    # 8,192 scores by 8 warps on 4 schedulers: 2 / 8.192 cycles a 1,000 scores for each instruction of a warp.
    one = 2 / 8.192
    cost = cost_of(CODE)
    assert cost.issue == pytest.approx(6 * one) and cost.exp2 == pytest.approx(8 * one)
    assert cost.half == pytest.approx(2 * one)  # FMNMX on one unit, IMAD on another
    assert cost.tensor == pytest.approx(1000 * 2 * 2 * 16 / 4096) and cost.wasted == 0.0 and cost.spilled == 0
    speed = 1000 * 64 * 132 * 1.7e-3
    assert cost.serial == pytest.approx(speed / (cost.tensor + 8 * one))
    assert cost.overlap == pytest.approx(speed / cost.tensor)


def test_spills_repeated_products_and_older_instructions_are_seen() -> None:
    slow = CODE.replace("FFMA R1, R2, R3, R4", "LDL R1, [R2]").replace(".L_x_2:", ".L_x_8:")
    assert cost_of(slow).spilled == 1
    repeated = CODE.replace("/*0020*/", "/*0018*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;\n        /*0020*/")
    assert cost_of(repeated).wasted == pytest.approx(1.0) and cost_of(repeated).tensor == 2 * cost_of(CODE).tensor
    older = re.sub(r"HGMMA\S+", "HMMA.16816.F32.BF16", CODE)
    assert cost_of(older).tensor == pytest.approx(cost_of(CODE).tensor / loop_cost.MMA_SHARE)
    assert cost_of(older, arch=80).tensor == pytest.approx(2 * cost_of(CODE).tensor)
    assert loop_cost.loop_cost("", "forward_kernel", 64, 128, 64, 8, 90) is None


def test_a_pair_of_numbers_that_llvm_mixes_is_seen() -> None:
    code = (
        "mul.wide.u32 \t%rd1, %r1, 268435456;\n shl.b64 \t%rd2, %rd3, 33;\n"
        "or.b64 \t%rd4, %rd1, %rd2;\n mov.b64 \t{_, %r2}, %rd4;\n"
    )
    assert compile_check.spoils_a_pair(code)
    for right in code.replace("mul.wide.u32", "and.b64"), code.replace("{_, %r2}", "{%r2, %r3}"):
        assert not compile_check.spoils_a_pair(right)


def test_a_register_that_nothing_wrote_is_seen() -> None:
    code = (
        "/*0000*/ R2UR UR4, R2 ;\n /*0010*/ @!P0 UIADD3.64 UR6, UR4, 0x2, URZ ;\n"
        "/*0020*/ UIADD3 UR8, UP0, UR7, 0x20, URZ ;\n /*0030*/ HGMMA.64x16x16.F32.BF16 R8, R4, gdesc[UR6], R8 ;\n"
    )
    assert not compile_check.reads_unset(code)
    for wrong in code.replace("UR7,", "UR8,"), code.replace("UIADD3.64", "UIADD3"), code.replace("R2UR UR4", "MOV R4"):
        assert compile_check.reads_unset(wrong)


def test_float32_arithmetic_runs_at_half_rate_on_ampere() -> None:
    loop = Loop(["FFMA R1, R2, R3, R4"] * 5 + ["IMAD R1, R2, R3, R4"] + ["LOP3.LUT R1, R2"] * 2 + ["SHFL.BFLY PT, R1"])
    assert loop.half(loop_cost.RATES[90]) == 2 * 2 + 4
    assert loop.half(loop_cost.RATES[80]) == 2 * 6


def test_bytes_by_hand() -> None:
    found = traffic(CODE, registers=32, shared=0, num_warps=4, arch=90)
    assert found is not None and found.instructions == pytest.approx(3 / 24) and found.width == 128
    assert found.resident == 16  # 2,048 threads
    bytes_a_cycle = 3.35e12 / (132 * 1.7e9)
    assert found.share == min(1.0, 128 / (3 / 24) / bytes_a_cycle, 16 * 128 * 16 / (600 * 1.7 * bytes_a_cycle)) == 1.0
    few = traffic(CODE, registers=255, shared=200_000, num_warps=4, arch=90)
    assert few is not None and few.resident == 1 and few.share == pytest.approx(2048 / (600 * 1.7 * bytes_a_cycle))
    assert traffic("", 32, 0, 4, 90) is None


def result(serial: float, case: str = "bf16 D64 plain") -> Result:
    cost = Cost(1.0, 1.0, 1.0, 1.0, serial, serial, 0.0, 0)
    return Result(90, case, "forward_kernel", "128x128", 8, 200, 0, 0, "wgmma", cost, "")


def test_a_loop_may_not_get_dearer() -> None:
    table = {(90, "forward_kernel", "bf16 D64 plain"): 450.0}
    assert why_dearer(result(440.0), table) == why_dearer(result(500.0), table) == ""
    assert "430 TFLOP/s predicted, 450 in compiled.md" in why_dearer(result(430.0), table)
    assert why_dearer(result(1.0, "bf16 D64 another"), table) == ""


def test_a_line_of_the_table_is_read_as_it_was_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "table.md"
    file.write_text(loop_cost.HEADER.format(version="3.7.1") + loop_cost.line_of(result(450.0)) + "\n")
    monkeypatch.setattr(loop_cost, "TABLE", file)
    assert recorded() == ("3.7.1", {(90, "forward_kernel", "bf16 D64 plain"): 450.0})
    file.unlink()
    assert recorded() == ("", {})


# Predicted TFLOP/s of steady loops on sm_90 that may not be lost again, without anything asked.
GOALS = {
    "forward_kernel": {64: 445, 128: 590, 256: 550},
    "query_kernel": {64: 530, 128: 660},
    "key_value_kernel": {64: 500, 128: 570},
}


def test_the_recorded_table_is_whole_and_reaches_its_goals() -> None:
    _, table = recorded()
    for arch in loop_cost.RATES:
        for feature in TABLE_FEATURES:
            for size in TABLE_SIZES:
                is_hopper = feature.startswith("hopper")
                for kernel in ("hopper_forward_kernel",) if is_hopper else GOALS:
                    assert (arch, kernel, f"bf16 D{size} {feature}") in table or (is_hopper and arch != 90)
    for kernel, sizes in GOALS.items():
        for size, goal in sizes.items():
            assert table[90, kernel, f"bf16 D{size} plain"] >= goal
            causal = 0.85 if size == 256 else 0.95
            assert table[90, kernel, f"bf16 D{size} causal"] >= causal * table[90, kernel, f"bf16 D{size} plain"]
            assert table[90, kernel, f"bf16 D{size} mask"] >= 0.75 * table[90, kernel, f"bf16 D{size} plain"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("", "plain"),
        ("right", "causal"),
        ("right left", "mask"),
        ("left", "mask"),
        ("attn_mask", "mask"),
        ("right softcap", "mask"),
        ("alibi_slopes", "mask"),
        ("key_lengths bottom_right", "plain"),
        ("right left seed", "dropout"),
        ("attn_mask seed", "every"),
        ("right softcap alibi_slopes", "every"),
    ],
    ids=str,
)
def test_what_a_call_asks_by_hand(asked: str, expected: str) -> None:
    given = {name: torch.ones(1) if name in TENSORS else 1 for name in asked.split()}
    assert what_is_asked(Call(**given)) == expected


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 120])
def test_every_call_has_a_tile(capability: int) -> None:
    for kernel in "forward", "query", "key_value", "mask":
        for size in 1, 16, 64, 65, 128, 256, 1024:
            tiles = {asked: choose_tile(kernel, size, 2, 4096, capability, asked) for asked in ASKED}
            assert all(side in (16, 32, 64, 128) for tile in tiles.values() for side in tile[:2])
            if size > 256:  # in chunks, whose loops hold more
                assert set(tiles.values()) == {choose_tile(kernel, 128, 2, 4096, capability, "every")}
            few = choose_tile(kernel, size, 2, 5, capability, "plain")
            assert few.block_q == 16 and (few.num_warps == 4 or kernel == "key_value")


# What was seen to fit


DIGESTS = """
from bench.compile_cases import Case
from bench.compile_check import digest_of
cases = [Case(90, "bf16", *case) for case in ((64, "short 5"), (64, "plain"), (1024, "norm"))]
found = [digest_of(case) for case in cases]
assert found == [digest_of(case) for case in reversed(cases)][::-1]  # whatever was looked at before
print(found[0], found[2])
"""


def digests_in(folder: Path) -> list[str]:
    settings = {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": str(folder)}
    environment = {**os.environ, **settings}
    done = subprocess.run([sys.executable, "-c", DIGESTS], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.long
def test_a_case_is_compiled_again_when_its_kernels_have_changed(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    for name in "kernels", "bench", "docs":
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    file = tmp_path / "kernels" / "attention" / "score.py"
    text, (attention, norm) = file.read_text(), digests_in(tmp_path)

    def digests_with(*changes: tuple[str, str]) -> list[str]:
        changed = text
        for old, new in changes:
            assert old in changed
            changed = changed.replace(old, new)
        file.write_text(changed)
        return digests_in(tmp_path)

    line = "    ds = weights * (dp - delta)\n"
    layout = "    # A comment.\n    ds = (weights) * (\n        dp - delta)\n"
    assert digests_with(("class Bounds", "\n# A comment.\n\n\nclass Bounds"), (line, layout)) == [attention, norm]
    for change in (
        (line, line.replace("- delta", "+ delta")),
        ("    offset: Any\n", "    offset: Any = 0\n"),
        ("constexpr(1.4426950408889634)", "constexpr(1.0)"),
    ):
        changed = digests_with(change)
        assert changed[0] != attention and changed[1] == norm


def test_only_what_is_not_known_to_fit_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    compiled: list[str] = []

    def compile_cases(cases: list[Case], jobs: int) -> Iterator[list[Result]]:
        for case in cases:
            compiled.append(case.label)
            fault = "" if case.size == 64 else "spills 8 bytes"
            yield [Result(case.arch, case.label, "a_kernel", "", 4, 64, 8 * bool(fault), 0, "-", None, fault)]

    monkeypatch.setattr(compile_check, "RECORD", tmp_path / "compiled.txt")
    monkeypatch.setattr(compile_check, "compile_cases", compile_cases)
    monkeypatch.setattr(compile_check, "digests", lambda cases, jobs: [f"old{case.size}" for case in cases])
    asked = ["--quick", "--arch", "90", "--only", "hopper"]
    two = ["bf16 D64 hopper causal", "bf16 D128 hopper causal"]

    def seen(*more: str) -> list[str]:
        compiled.clear()
        code = compile_check.main([*asked, *more])
        assert code == ("FAULT" in capsys.readouterr().out)
        return [*compiled]

    assert seen() == two  # and nothing is written
    assert seen("--write") == two
    assert seen() == two[1:]  # what does not fit is not in the record
    assert seen("--spills-allowed", "--write") == two[1:]
    assert seen("--spills-allowed") == [] and seen() == two[1:] and seen("--anew") == two
    monkeypatch.setattr(compile_check, "digests", lambda cases, jobs: [f"new{case.size}" for case in cases])
    assert seen("--spills-allowed") == two


def test_narrow_values_are_laid_out_as_their_keys() -> None:
    """What `reads_unset` looks for came of tiles of 32 and 16, 64 and 32, and 128 and 32 columns."""
    sizes = (20, 12), (12, 20), (40, 24), (80, 24), (72, 40), (16, 16), (128, 256), (300, 16)
    found = [(blocks["BLOCK_E"], blocks["BLOCK_EV"]) for blocks in (column_blocks(*size) for size in sizes)]
    assert found == [(32, 32), (32, 32), (64, 64), (128, 64), (128, 64), (16, 16), (128, 256), (128, 128)]


def test_the_record_is_of_cases_there_are() -> None:
    pytest.importorskip("triton")
    text = compile_check.RECORD.read_text()
    known = compile_check.read_record()
    assert len(known) == len(text.splitlines()) and known
    compile_check.write_record(known)
    assert compile_check.RECORD.read_text() == text


@pytest.mark.slow
def test_every_kernel_compiles() -> None:
    """The interpreter takes what the compiler refuses."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "bench.compile_check",
        "--quick",
        "--arch",
        "90",
        "--spills-allowed",
        "--jobs",
        "1",
    ]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and "FAULT" not in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["general", "short"])
def test_values_narrower_than_keys_compile_right(kernel: str) -> None:
    """In rows that cannot be copied asynchronously, so that both take turns in one place: `whole_columns`."""
    pytest.importorskip("triton")
    script = """
import sys, torch, kernels
from bench.compile_check import disassemble, reads_unset
from bench.pretended import Chip, compiling
from kernels.attention.plan import forced
new = lambda size: torch.empty(1, 60, 3, size, dtype=torch.float16, device="meta").transpose(1, 2).requires_grad_()
found = lambda name, options, compiled: print(reads_unset(disassemble(compiled.asm["cubin"])))
with compiling(Chip(90), found), forced(kernel=sys.argv[1]):
    kernels.scaled_dot_product_attention(new(40), new(40), new(24), backend="triton").sum().backward()
"""
    command, settings = [sys.executable, "-c", script, kernel], {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False"] * (2 if kernel == "short" else 4), done.stdout + done.stderr
