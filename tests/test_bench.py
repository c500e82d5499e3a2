"""The benchmarks' accounting against hand numbers, and their check of providers."""

import math
import statistics
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import attention, bench_language_model, bench_translation, timing, training_speed
from bench import bench_layer_norm as layer_norm
from bench.accounting import AttentionCase, NormCase, Work, attention_cases, norm_cases, short_cases
from bench.ceilings import Ceilings
from bench.check import WrongResult, relative_error, require_right
from bench.nn_transformer import PlainTransformer
from bench.record import Refused, attempt, figures
from bench.timing import Samples
from calcformer.config import PRESETS

CPU = torch.device("cpu")
NORM_CASES = [
    NormCase(13, 11, torch.float32),
    NormCase(13, 11, torch.float32, "rms norm"),
    NormCase(13, 11, torch.float32, "add + layer norm"),
    NormCase(61, 67, torch.float32, "add + layer norm", 0.1),
    NormCase(61, 67, torch.bfloat16, "add + layer norm", 0.1),
    NormCase(13, 11, torch.float32, "add + rms norm"),
]
SMALL = AttentionCase(2, 6, 7, 5, dtype=torch.float32, kv_heads=2, mask="bias")


def test_attention_work_by_hand():
    # 2 products of 3x3x5 a head, 2 operations each; 4 tensors of 2*2*3*5 elements of 2 bytes
    case = AttentionCase(2, 2, 3, 5)
    assert case.work("forward") == Work(2 * 2 * 2 * (2 * 3 * 3 * 5), 4 * 60 * 2, torch.bfloat16)
    assert case.work("backward") == Work(5 * 2 * 2 * 90, 7 * 60 * 2, torch.bfloat16)


def test_causal_attention_counts_half():
    full, causal = (AttentionCase(4, 16, 4_096, 128, is_causal) for is_causal in (False, True))
    assert causal.work("forward").flops == full.work("forward").flops // 2 == 274_877_906_944
    assert causal.work("backward").flops == 687_194_767_360  # 2.5 times
    assert causal.work("forward").bytes == full.work("forward").bytes == 4 * 4 * 16 * 4_096 * 128 * 2


def test_shared_heads_masks_and_biases_are_counted_once():
    case = AttentionCase(1, 6, 7, 5, dtype=torch.float32, kv_heads=2)
    assert case.work("forward").bytes == 4 * (2 * 6 * 35 + 2 * 2 * 35)
    assert case.work("backward").bytes == 4 * (3 * 6 * 35 + 4 * 2 * 35)
    padded = AttentionCase(3, 2, 7, 5, dtype=torch.float32, mask="padding").work("forward")
    assert padded.bytes == 4 * 4 * 3 * 2 * 35 + 3 * 7
    plain, biased = (AttentionCase(3, 2, 7, 5, mask=mask).work("backward") for mask in ("", "bias"))
    assert biased.bytes == plain.bytes + 2 * 2 * 49 * 2 and biased.flops == plain.flops


def test_norm_work_by_hand():
    # 3 rows of 5: 15 elements a tensor, 5 a parameter, of 4 bytes; a number or two a row of 4 bytes
    case = NormCase(3, 5, torch.float32)
    assert case.work("forward") == Work(0, 4 * (2 * 15 + 2 * 5) + 3 * 2 * 4, torch.float32)
    assert case.work("backward").bytes == 4 * (3 * 15 + 3 * 5) + 3 * 2 * 4
    case = NormCase(3, 5, torch.float32, "rms norm")
    assert case.work("forward").bytes == 4 * (2 * 15 + 5) + 3 * 4
    assert case.work("backward").bytes == 4 * (3 * 15 + 2 * 5) + 3 * 4


def test_a_sum_and_dropout_cost_what_they_read_and_write():
    case = NormCase(3, 5, kind="add + layer norm")  # bfloat16
    assert case.work("forward").bytes == 2 * (4 * 15 + 2 * 5) + 3 * 2 * 4  # input, residual, output, sum
    assert case.work("backward").bytes == 2 * (4 * 15 + 3 * 5) + 3 * 2 * 4  # sum, two gradients in, one out
    dropped = NormCase(3, 5, kind="add + layer norm", dropout=0.1)
    assert dropped.work("forward") == case.work("forward")
    assert dropped.work("backward").bytes == case.work("backward").bytes + 2 * 15  # two gradients out
    assert NormCase(3, 5, kind="add + rms norm").work("backward").bytes == 2 * (4 * 15 + 2 * 5) + 3 * 4


def test_labels():
    assert str(AttentionCase(4, 16, 4_096, 128, True)) == "B4 H16 S4096 D128 causal bf16"
    assert str(SMALL) == "B2 H6 Hkv2 S7 D5 full bias fp32"
    assert str(NormCase(512, 1_024, torch.float16)) == "layer norm M512 N1024 fp16"
    dropped = NormCase(7, 11, kind="add + layer norm", dropout=0.1)
    assert dropped.group("backward") == "add + layer norm backward M7 N11 dropout 0.1 bf16"
    for on_gpu in (False, True):
        for cases in (attention_cases(on_gpu), norm_cases(on_gpu)):
            assert len(set(map(str, cases))) == len(cases)


def test_gpu_cases_keep_the_tokens():
    long = [case for case in attention_cases(True) if case.batch * case.length == 16_384 and not case.kv_heads]
    assert {case.head_size for case in long} == {64, 128, 256}
    assert {case.length for case in long} == {128, 512, 1_024, 2_048, 4_096, 8_192, 16_384}
    assert {case.length for case in short_cases(True)} == {5, 9, 16, 32, 64}
    assert {case.batch * case.heads for case in short_cases(True)} == {4_096, 32_768, 65_536, 262_144}


def test_share_of_the_ceiling():
    limits = Ceilings(copy_bytes=100.0, matrix_flops=1_000.0)
    work = NormCase(3, 5, torch.float32).work("forward")  # 184 bytes
    assert limits.floor(work) == 1.84 and limits.bound(work) == "memory"
    work = AttentionCase(1, 1, 4, 5, dtype=torch.float32).work("forward")  # 320 bytes, 320 operations
    assert limits.floor(work) == 3.2
    assert limits._replace(matrix_flops=10.0).floor(work) == 32.0
    assert limits._replace(matrix_flops=10.0).bound(work) == "matrix"


def test_figures_of_a_row(monkeypatch):
    monkeypatch.setattr("bench.record.ceilings", lambda device, dtype: Ceilings(1e12, 1e15))
    work = AttentionCase(4, 16, 4_096, 128, True).work("forward")
    row = figures(Samples([1e-3, 2e-3, 9e-3], "by hand", 5e-6), work, CPU)
    assert row["cpu_ms"] == 2.0 and row["host_us"] == pytest.approx(5.0)
    assert row["tflops_per_second"] == pytest.approx(137.438953472)
    assert row["share_of_ceiling"] == pytest.approx(0.137438953472) and row["bound"] == "matrix"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        AttentionCase(2, 2, 7, 5, True, torch.float32),
        AttentionCase(3, 2, 7, 5, dtype=torch.float32, mask="padding"),
    ],
    ids=str,
)
def test_right_attention_passes_and_wrong_is_rejected(monkeypatch, case, backward):
    inputs = attention.make_inputs(case, CPU, requires_grad=backward)
    attention.check("torch math", case, inputs, backward)
    right = attention.build("torch math", case)
    for wrong in (
        lambda x: right(x._replace(query=x.query * 1.01)),  # the scale of the scores
        lambda x: right(x).roll(1, 2),  # rows in the wrong place
        lambda x: right(x) * math.nan,
        lambda x: right(x)[:, :, :-1],  # the last row missing
    ):
        monkeypatch.setattr(attention, "build", lambda provider, case, wrong=wrong: wrong)
        with pytest.raises((WrongResult, RuntimeError), match="torch math|Mismatch in shape"):
            attention.check("torch math", case, inputs, backward)


def test_dropout_that_drops_nothing_is_rejected(monkeypatch):
    case = AttentionCase(2, 2, 64, 8, dtype=torch.float32, dropout=0.1)
    inputs = attention.make_inputs(case, CPU)
    attention.check("torch math", case, inputs, backward=False)
    without = attention.build("torch math", case.without_dropout())
    monkeypatch.setattr(attention, "build", lambda provider, case: without)
    with pytest.raises(WrongResult, match="dropout"):
        attention.check("torch math", case, inputs, backward=False)


@pytest.mark.parametrize("with_statistics", [False, True])
@pytest.mark.parametrize("provider", attention.FLASH)
def test_flash_attention_is_asked_as_its_package_wants_it(monkeypatch, provider, with_statistics):
    def flash_attn_func(q, k, v, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        output = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
        return (output, None) if with_statistics else output

    module = attention.FLASH[provider]
    for name in module.split(".")[0], module:
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(flash_attn_func=flash_attn_func))
    case = AttentionCase(2, 4, 7, 5, True, torch.float32, kv_heads=2)
    for backward in (False, True):
        attention.check(provider, case, attention.make_inputs(case, CPU, requires_grad=backward), backward)
    for other in (replace(case, dropout=0.1), replace(case, mask="padding")):
        with pytest.raises(ValueError, match="no masks and no dropout"):
            attention.build(provider, other)


def test_flash_attention_that_is_not_installed_is_refused_with_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(ImportError):
        attention.build("FlashAttention-3", AttentionCase(3, 2, 8, 5))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_right_norm_passes_and_wrong_is_rejected(monkeypatch, case, backward):
    inputs = layer_norm.make_inputs(case, CPU, requires_grad=True)
    for provider in ("kernels", "torch eager"):
        layer_norm.check(provider, case, inputs, backward)
    right = layer_norm.build("torch eager", case, CPU)

    def changed(x, place):  # of output or sum, 5 % and more of it is something else
        results = list(right(x))
        results[place] = results[place] + 0.05 * x.input.roll(1, 0)
        return tuple(results)

    for place in range(1 + case.adds):
        monkeypatch.setattr(layer_norm, "build", lambda *_, place=place: lambda x: changed(x, place))
        with pytest.raises(WrongResult):
            layer_norm.check("torch eager", case, inputs, backward)


def test_norm_gradients_are_those_of_the_formula():
    for case in NORM_CASES:
        inputs = layer_norm.make_inputs(case, CPU, requires_grad=True)
        wide = layer_norm.Inputs(*(None if x is None else x.detach().double() for x in inputs))
        for x in wide.differentiable():
            x.requires_grad_()
        plain = NormCase(case.rows, case.columns, torch.float64, case.kind)
        results = layer_norm.build("torch eager", plain, CPU)(wide)
        found = torch.autograd.grad(results, wide.differentiable(), wide.upstream())
        ones = torch.ones_like(wide.input)
        torch.testing.assert_close(list(found), layer_norm.exact(plain, wide, ones, True), rtol=1e-10, atol=1e-10)


def test_norm_dropout_of_the_wrong_share_or_not_replayed_is_rejected(monkeypatch):
    case = NormCase(61, 67, torch.float32, "add + layer norm", 0.1)
    inputs = layer_norm.make_inputs(case, CPU, requires_grad=True)
    right = layer_norm.build("torch eager", case, CPU)
    for other in (0.0, 0.2):
        wrong = layer_norm.build("torch eager", replace(case, dropout=other), CPU)
        monkeypatch.setattr(layer_norm, "build", lambda *_, wrong=wrong: wrong)
        with pytest.raises(WrongResult, match="dropout"):
            layer_norm.check("torch eager", case, inputs, backward=False)

    class Forgetful(torch.autograd.Function):
        """Right results; the gradient of the input is not dropped."""

        @staticmethod
        def forward(ctx, *tensors):
            ctx.inputs = layer_norm.Inputs(*tensors, None, None)
            return right(ctx.inputs)

        @staticmethod
        def backward(ctx, grad_output, grad_sum):
            x = ctx.inputs._replace(grad_output=grad_output, grad_sum=grad_sum)
            return tuple(grad.float() for grad in layer_norm.exact(case, x, torch.ones(61, 67).double(), True))

    monkeypatch.setattr(layer_norm, "build", lambda *_: lambda x: Forgetful.apply(*x[:4]))
    layer_norm.check("forgetful", case, inputs, backward=False)
    with pytest.raises(WrongResult, match="tensor 0"):
        layer_norm.check("forgetful", case, inputs, backward=True)


@pytest.mark.parametrize("provider, package", [("Liger", "liger_kernel"), ("QuACK", "quack")])
def test_a_norm_that_a_peer_lacks_is_refused_with_a_reason(monkeypatch, provider, package):
    for case in (NormCase(7, 11, kind="add + layer norm"), NormCase(7, 11, kind="add + layer norm", dropout=0.1)):
        with pytest.raises(ValueError, match="has no add . layer norm"):
            layer_norm.build(provider, case, CPU)
    monkeypatch.setitem(sys.modules, package, None)  # not installed, also where it is
    with pytest.raises(ImportError):
        layer_norm.build(provider, NormCase(7, 13), CPU)


def test_bounds_by_hand():
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    require_right("peer", [exact.bfloat16() * 1.0078125], [exact])  # one unit in the last place: 0.8 %
    with pytest.raises(WrongResult, match="peer: tensor 0 is 7.8e-03 from the exact one, allowed 1e-05"):
        require_right("peer", [exact * 1.0078125], [exact])
    with pytest.raises(WrongResult, match="1 tensors, expected 2"):
        require_right("peer", [exact], [exact, exact])


def test_a_peer_may_refuse_but_not_be_wrong_and_ours_may_do_neither():
    def refuse():
        raise RuntimeError("not for heads of 512")

    def be_wrong():
        raise WrongResult("far off")

    with pytest.raises(Refused, match="torch flash refuses: not for heads of 512"):
        attempt("torch flash", refuse)
    with pytest.raises(RuntimeError, match="heads of 512"):
        attempt("kernels", refuse)
    with pytest.raises(WrongResult):
        attempt("torch flash", be_wrong)


def test_measuring_takes_every_input_in_turn():
    seen = []
    samples = timing.measure([lambda: seen.append(0), lambda: seen.append(1)], CPU, seconds=0.01)
    assert samples.method == "wall clock" and len(samples.seconds) >= timing.ROUNDS[0]
    assert samples.median == statistics.median(samples.seconds) > 0
    assert abs(seen.count(0) - seen.count(1)) <= 2
    assert timing.input_sets(100, CPU) == 1


def test_pytest_benchmark_sees_the_samples():
    class Benchmark:
        def pedantic(self, function, rounds):
            self.seconds = []
            for _ in range(rounds):
                started = timing.clock()
                function()
                self.seconds.append(timing.clock() - started)

    benchmark = Benchmark()
    timing.play_samples(benchmark, [0.5, 0.25, 2.0])
    assert benchmark.seconds == [0.5, 0.25, 2.0]


def test_the_training_peer_has_as_many_parameters():
    config = PRESETS["formula"].with_settings({"train_size": 8, "valid_size": 1})
    task = config.data.build()
    ours, theirs = config.model.build(task), PlainTransformer(task, config.model)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    examples = task.split()[0]
    assert theirs(examples.source, examples.decoder_input).shape == (8, task.target_length - 1, len(task.vocabulary))


def test_training_table_by_hand():
    speeds = {
        (provider, way): training_speed.Speed([seconds / share, seconds / share], [seconds, seconds], 100)
        for provider, seconds in zip(training_speed.PROVIDERS, (1.0, 3.0, 2.0))
        for way, share in ((training_speed.ONE, 1), (training_speed.TWO, 2))
    }
    speeds[training_speed.OURS, training_speed.PAIR] = training_speed.Speed([0.25, 0.25], [0.2, 0.2], 100)
    text = training_speed.table(speeds)
    assert "3.00 x as fast as nn.Transformer with one thread each (3.00 by CPU time), 6.00 x with" in text
    assert "2.00 x as fast as " + training_speed.LEAN in text and text.endswith("4.00 x with each in its best way")


def test_the_language_models_of_a_benchmark_are_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Untied and tied: they have the same scores and losses, and a provider that does other work is not timed."""
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)
    for tied in (False, True):
        size = bench_language_model.Size(11, 7, 2, 20, 4, 6, 3, 23, tied)
        ours = size.build()
        ids = torch.randint(11, (2, 7))
        for joint in (False, True):
            theirs = bench_language_model.PlainModel(size, ours, joint)
            torch.testing.assert_close(theirs(ids), ours(ids))
            assert sum(x.numel() for x in theirs.parameters()) == sum(x.numel() for x in ours.parameters())
        steps = bench_language_model.build_steps(size, torch.device("cpu"))
        bench_language_model.check(steps)
        scored = steps[bench_language_model.LEAN]
        steps[bench_language_model.LEAN] = lambda scored=scored: 1.001 * scored()
        with pytest.raises(WrongResult, match="torch.nn, lean: losses"):
            bench_language_model.check(steps)


@pytest.mark.parametrize("preset", ["formula", "translate"])  # norms last, embeddings apart; norms first, one embedding
def test_the_peer_is_the_same_model(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)
    task = bench_translation.made_up(31, 13, 7)
    config = PRESETS[preset].model
    ours, theirs = config.build(task).eval(), PlainTransformer(task, config).eval()
    assert sum(x.numel() for x in theirs.parameters()) == sum(x.numel() for x in ours.parameters())
    theirs.copy_weights(ours)
    source, target = task.trained.inputs
    is_real = target != task.vocabulary.pad_id
    torch.testing.assert_close(theirs(source, target)[is_real], ours(source, target)[is_real])


def test_providers_of_translation_do_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the same losses, and answers that end where they are to; who says something else is not timed."""
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)
    work = bench_translation.Work(smoke=True)
    task, config = work.task(), work.config()
    bench_translation.check_training(task, config)
    with pytest.raises(WrongResult, match="nn.Transformer: losses"):
        bench_translation.require_same_losses({bench_translation.OURS: [2.0], bench_translation.PLAIN: [2.001]})

    answers = bench_translation.build_answers(task, config)
    said = {provider: answer(task.tested) for provider, answer in answers.items()}
    bench_translation.require_same_answers(said)
    pad_id, eos_id = task.vocabulary.pad_id, task.vocabulary.eos_id
    right = task.tested.labels
    for tokens in said.values():
        assert torch.equal(tokens == eos_id, right == eos_id) and torch.equal(tokens == pad_id, right == pad_id)
    other = said[bench_translation.AGAIN].clone()
    other[:, 0] += 1
    with pytest.raises(WrongResult, match="100.0% of the answers"):
        bench_translation.require_same_answers({**said, bench_translation.AGAIN: other})


def test_translation_speed_by_hand() -> None:
    ours = bench_translation.Speed([1.0, 2.0, 4.0], [1.0, 1.0, 1.0], [10, 40, 60])
    theirs = bench_translation.Speed([2.0, 6.0, 8.0], [2.0, 2.0, 3.0], [10, 40, 60])
    assert ours.tokens_per_second == 15.0 and ours.times(theirs) == 2.0 and ours.times(theirs, cpu=True) == 2.0
