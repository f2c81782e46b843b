"""Objectives on cases that can be worked out by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dawhisper.errors import OptionError
from dawhisper.model import DualOptions, ModelDimensions, Whisper, is_second_branch
from dawhisper.training import losses
from dawhisper.training.flops import forward_flops
from dawhisper.training.inputs import Inputs, count
from dawhisper.training.objective import ObjectiveOptions, Student, Teacher
from dawhisper.training.optimizer import make_optimizer, optimizer_step, parameter_groups, rate_factor
from dawhisper.training.recipe import Freezable, ModelOptions, OptimOptions
from dawhisper.training.surgery import freeze, taught_layers

TRUE = torch.ones(1, 2, dtype=torch.bool)


def test_cross_entropy_ignores_padding() -> None:
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [9.0, 0.0, 0.0]]])
    labels = torch.tensor([[0, 2, losses.IGNORE]])
    first, second = math.log(math.exp(2) + 2) - 2, math.log(3)
    assert losses.cross_entropy(logits, labels).item() == pytest.approx((first + second) / 2)
    assert losses.cross_entropy(logits, labels, count=torch.tensor(4.0)).item() == pytest.approx((first + second) / 4)
    nothing = torch.full_like(labels, losses.IGNORE)
    assert losses.cross_entropy(logits, nothing).item() == 0


def test_label_smoothing() -> None:
    logits, labels = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0]])
    p = F.log_softmax(logits[0, 0], 0)
    expected = -(0.95 * p[0] + 0.05 * p[1])  # (1 - 0.1) on the label and 0.1 / 2 on each
    assert losses.cross_entropy(logits, labels, label_smoothing=0.1).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_and_its_gradient_are_torchs(monkeypatch: pytest.MonkeyPatch, smoothing: float) -> None:
    monkeypatch.setattr(losses, "ROWS", 4)
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (2, 5))
    labels[:, 3:] = losses.IGNORE
    value = losses.cross_entropy(logits, labels, smoothing)
    value.mul(3).backward()
    ours, logits.grad = logits.grad, None
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    expected.mul(3).backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(ours, logits.grad)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distil_logits_gradient_is_that_of_the_formula(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    monkeypatch.setattr(losses, "ROWS", 4)  # of 10: two and a half times
    torch.manual_seed(0)
    student, teacher, mask = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7), torch.rand(2, 5) > 0.3
    losses.distil_logits(student, teacher, mask, temperature).mul(3).backward()
    ours, student.grad = student.grad, None
    p, q = (F.log_softmax(x / temperature, dim=-1) for x in (teacher, student))
    (3 * temperature**2 * ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()).backward()
    torch.testing.assert_close(ours, student.grad)


def test_distil_logits_is_a_divergence() -> None:
    teacher = torch.tensor([[[math.log(3.0), 0.0], [5.0, 1.0]]])  # 3/4, 1/4 at the first position
    student = torch.zeros(1, 2, 2)
    mask = torch.tensor([[True, False]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert losses.distil_logits(student, teacher, mask).item() == pytest.approx(expected, rel=1e-5)
    assert losses.distil_logits(teacher, teacher, mask).item() == pytest.approx(0, abs=1e-6)
    hot = losses.distil_logits(student, 2 * teacher, mask, temperature=2.0).item()
    assert hot == pytest.approx(4 * expected, rel=1e-5)


def test_distil_features_is_relative_to_the_window_and_to_kept_positions() -> None:
    teacher = torch.tensor([[[1.0, -1.0], [1.0, -1.0], [50.0, 7.0]]])  # variance 1 over the kept positions
    mask = torch.tensor([[True, True, False]])
    assert losses.distil_features(teacher.clone(), teacher, mask).item() == 0
    student = teacher + torch.tensor([0.5, -0.5])
    assert losses.distil_features(student, teacher, mask).item() == pytest.approx(0.25, rel=1e-4)
    assert losses.distil_features(3 * student, 3 * teacher, mask).item() == pytest.approx(0.25, rel=1e-4)
    # a window weighs the same beside a much louder one
    both = losses.distil_features(
        torch.cat([student, 9 * student]), torch.cat([teacher, 9 * teacher]), mask.repeat(2, 1)
    )
    assert both.item() == pytest.approx(0.25, rel=1e-4)
    empty = losses.distil_features(student, teacher, torch.zeros_like(mask))
    assert empty.item() == 0


def test_gate_target_and_supervision() -> None:
    snr = torch.tensor([math.inf, 7.5, 12.5, -math.inf])
    assert losses.gate_target(snr).tolist() == pytest.approx([1, 0.5, 1 / (1 + math.exp(-1)), 0])
    gate = torch.tensor([[[0.8, 0.1]]])
    loss = losses.gate_supervision(gate, torch.tensor([7.5]), torch.tensor([[True, False]])).item()
    assert loss == pytest.approx(-0.5 * math.log(0.8) - 0.5 * math.log(0.2), rel=1e-3)
    sure = torch.ones(2, 1, 2, requires_grad=True)
    losses.gate_supervision(sure, torch.tensor([-math.inf]), TRUE).backward()
    assert sure.grad is not None and sure.grad.isfinite().all() and (sure.grad > 0).all()


def test_noise_dominance_by_frame() -> None:
    clean, noise = torch.zeros(1, 960), torch.zeros(1, 960)
    clean[:, :320], noise[:, 320:640] = 1.0, 1.0
    clean[:, 640:], noise[:, 640:] = 1.0, 1.0
    assert losses.noise_dominance(clean, noise, 4)[0].tolist() == pytest.approx([0, 1, 0.5, 0], abs=1e-4)


def test_noise_attention_wants_the_noise() -> None:
    dominance = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    right = torch.tensor([[-30.0, 0.0, 0.0, -30.0]]).view(1, 1, 1, 4).expand(1, 2, 2, 4)
    assert losses.noise_attention(right, dominance, TRUE).item() == pytest.approx(0, abs=1e-4)
    flat = losses.noise_attention(torch.zeros(1, 2, 2, 4), dominance, TRUE).item()
    assert flat == pytest.approx(math.log(2), rel=1e-4)
    assert losses.noise_attention(torch.zeros(1, 2, 2, 4), torch.zeros(1, 4), TRUE).item() == 0


def test_noise_mel_averages_pairs_of_frames() -> None:
    target = torch.arange(4.0).expand(3, 4)[None]  # [1, 3, 4] -> pairs 0.5 and 2.5
    predicted = torch.tensor([0.5, 2.5])[None, :, None].expand(1, 2, 3)
    assert losses.noise_mel(predicted, target, TRUE).item() == 0
    assert losses.noise_mel(predicted + 2, target, TRUE).item() == pytest.approx(4)


def test_frame_mask() -> None:
    mask = losses.frame_mask(torch.tensor([0, 320, 321, 10000]), 4)
    assert mask.sum(1).tolist() == [1, 1, 2, 4]


def tiny(n_text_layer: int = 2, n_audio_layer: int = 2) -> Whisper:
    return Whisper(ModelDimensions(80, 20, 32, 2, n_audio_layer, 100, 16, 32, 2, n_text_layer))


def some_inputs(batch: int = 4) -> Inputs:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 100, (batch, 8), generator=g)
    labels = torch.randint(0, 100, (batch, 8), generator=g)
    labels[:, 6:] = losses.IGNORE
    labels[0, 3:] = losses.IGNORE
    snr = torch.tensor([math.inf, 5.0, -math.inf, 0.0])[:batch]
    mel, noise = torch.randn(batch, 80, 40, generator=g), torch.randn(batch, 80, 40, generator=g)
    frames = losses.frame_mask(torch.tensor([6400, 3000, 6400, 2000])[:batch], 20)
    dominance = torch.rand(batch, 20, generator=g) * torch.isfinite(snr)[:, None]
    return Inputs(mel, tokens, labels, snr, frames, mel, noise, dominance)


EVERYTHING = ObjectiveOptions(cross_entropy=1.0, noise_attention=0.3, noise_mel=0.2, silence=0.5)


def test_a_fresh_student_already_hears_clean_audio_as_its_teacher() -> None:
    torch.manual_seed(0)
    teacher_model = tiny()
    model = tiny()
    model.load_state_dict(teacher_model.state_dict())
    model.add_second_branch(DualOptions())
    inputs, options = some_inputs(), ObjectiveOptions(silence=0.0, gate=0.0)
    student = Student(model, options)
    lesson = Teacher(teacher_model, options, range(2))(inputs)
    loss, parts = student(inputs, lesson, count(inputs))
    assert set(parts) >= {"logits", "encoder", "attention", "gate/clean_sum"}
    assert all("/" in name or hasattr(options, name) for name in parts)  # the rest are parts of the loss, by weight
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_the_secondarys_own_layers_learn_the_teachers_features_and_the_primarys_stay() -> None:
    torch.manual_seed(0)
    teacher_model, model = tiny(), tiny()
    model.load_state_dict(teacher_model.state_dict())
    model.add_second_branch(DualOptions(memory_layers=1))
    freeze(model, ["encoder", "primary"])
    inputs, options = some_inputs(), ObjectiveOptions(logits=0.0, attention=0.0, silence=0.0, gate=0.0)
    inputs = inputs._replace(mel=inputs.mel + torch.randn(inputs.mel.shape))
    student = Student(model, options)
    loss, parts = student(inputs, Teacher(teacher_model, options, range(2))(inputs), count(inputs))
    assert parts["encoder"] > 1e-3
    loss.backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    own = {name for name, p in model.named_parameters() if "secondary_blocks" in name or "secondary_ln_post" in name}
    # a key's bias would shift all scores alike: there is none, and the query's gradient may be as small as it likes
    assert learnt == own | {"encoder.mixture"}


def test_hints_are_of_the_same_layers_from_the_top() -> None:
    torch.manual_seed(0)
    teacher_model, model = tiny(n_audio_layer=3), tiny(n_audio_layer=3)
    model.load_state_dict(teacher_model.state_dict())
    model.add_second_branch(DualOptions(memory_layers=2))
    options = ObjectiveOptions(logits=0.0, encoder=0.0, attention=0.0, silence=0.0, gate=0.0, layers=1.0)
    inputs = some_inputs()
    student, teacher = Student(model, options), Teacher(teacher_model, options, range(2))
    assert student(inputs, teacher(inputs), count(inputs))[1]["layers"].item() == pytest.approx(0, abs=1e-6)

    noisy = inputs._replace(mel=inputs.mel + torch.randn(inputs.mel.shape))
    loss, parts = student(noisy, teacher(noisy), count(noisy))
    heard: list[Tensor] = []
    taught: list[Tensor] = []
    model.encoder(noisy.mel, heard)
    teacher_model.encoder(noisy.clean_mel, taught)
    assert (len(heard), len(taught)) == (2, 3)  # the secondary's own ones
    mine, theirs = (F.layer_norm(x, x.shape[-1:]) for x in (heard[0], taught[1]))
    expected = losses.distil_features(mine, theirs[:, : noisy.frames.shape[1]], noisy.frames)
    assert loss.item() == pytest.approx(parts["layers"].item())
    assert parts["layers"].item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    learnt = {name for name, p in model.encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("secondary_blocks.0.") for name in learnt)
    assert any(name.startswith("blocks.0.") for name in learnt)  # below the own ones
    assert not any(name.startswith(("secondary_blocks.1.", "blocks.1.", "ln_post")) for name in learnt)


def test_what_may_be_frozen() -> None:
    model = Whisper(ModelDimensions(80, 8, 32, 2, 2, 60, 8, 32, 2, 2), DualOptions(memory_layers=1))
    every = {name for name, _ in model.named_parameters()}
    second = {name for name in every if is_second_branch(name)}
    in_encoder = {name for name in every if name.startswith("encoder.")}
    frozen = {
        "encoder": in_encoder - second,
        "primary": every - in_encoder - second,
        "embedding": {"decoder.token_embedding.weight"},
        "secondary": second,
        "memory": in_encoder & second,
    }
    assert set(frozen) == set(get_args(Freezable))
    for one in get_args(Freezable):
        for other in get_args(Freezable):
            if frozen[one] | frozen[other] != every:
                freeze(model, [one, other])
                stays = {name for name, p in model.named_parameters() if not p.requires_grad}
                assert stays == frozen[one] | frozen[other]
    with pytest.raises(OptionError, match="leaves nothing to train"):
        freeze(model, ["encoder", "primary", "secondary"])


def test_losses_add_up_however_the_step_is_split() -> None:
    torch.manual_seed(0)
    teacher_model, model = tiny(), tiny()
    model.add_second_branch(DualOptions())
    student, teacher = Student(model, EVERYTHING), Teacher(teacher_model, EVERYTHING, range(2))
    inputs = some_inputs()
    whole, parts = student(inputs, teacher(inputs), count(inputs))
    pieces = [Inputs(*(x[rows] if isinstance(x, Tensor) else x for x in inputs)) for rows in ([0, 1], [2, 3])]
    counts = count(pieces[0]) + count(pieces[1])
    assert torch.equal(counts, count(inputs))
    split = [student(piece, teacher(piece), counts) for piece in pieces]
    assert sum(loss.item() for loss, _ in split) == pytest.approx(whole.item(), rel=1e-5)
    for name, value in parts.items():
        assert sum(part[name].item() for _, part in split) == pytest.approx(value.item(), rel=1e-4), name


def test_silent_windows_teach_silence_alone() -> None:
    torch.manual_seed(0)
    student = Student(tiny(), ObjectiveOptions(cross_entropy=1, logits=0, encoder=0, attention=0, gate=0, silence=1))
    inputs = some_inputs()
    _, parts = student(inputs, None, count(inputs))
    spoken = inputs.labels.clone()
    spoken[2] = losses.IGNORE
    logits = student.model(inputs.mel, inputs.tokens)
    assert parts["cross_entropy"].item() == pytest.approx(losses.cross_entropy(logits, spoken).item(), rel=1e-5)
    silent = inputs.labels[2:3]
    assert parts["silence"].item() == pytest.approx(losses.cross_entropy(logits[2:3], silent).item(), rel=1e-5)


def test_who_teaches_whom() -> None:
    assert taught_layers(tiny(2), tiny(4), ModelOptions(decoder_layers=(0, 3))) == [0, 3]
    assert taught_layers(tiny(2), tiny(4), ModelOptions()) == [1, 3]
    assert taught_layers(tiny(3), tiny(3), ModelOptions()) == [0, 1, 2]


def test_parameter_groups() -> None:
    model = tiny()
    model.add_second_branch(DualOptions())
    student = Student(model, EVERYTHING)
    options = OptimOptions(lr=1.0, lr_new=2.0, lr_gate=3.0, weight_decay=0.1)
    groups = {group["name"]: group for group in parameter_groups(student, options)}
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    inside = {key: {names[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert sum(map(len, inside.values())) == len(names)
    assert "model.decoder.blocks.0.cross_attn.query.weight" in inside["old"]
    assert {"model.decoder.token_embedding.weight", "model.encoder.ln_post.bias"} <= inside["old_no_decay"]
    assert {"noise_head.weight", "model.decoder.blocks.0.secondary_attn.query.weight"} <= inside["new"]
    assert "model.decoder.noise_embed" in inside["new_no_decay"]
    assert inside["gate"] == {f"model.decoder.blocks.{i}.gate.{j}.weight" for i in (0, 1) for j in (0, 2)}
    assert {"model.encoder.mixture", "model.decoder.blocks.1.noise_scale"} <= inside["gate_no_decay"]
    assert [groups[name]["peak_lr"] for name in ("old", "new", "gate_no_decay")] == [1.0, 2.0, 3.0]
    assert groups["old"]["weight_decay"] == 0.1 and groups["new_no_decay"]["weight_decay"] == 0
    freeze(model, ["encoder", "primary"])
    left = {group["name"] for group in parameter_groups(student, options)}
    assert left == {"new", "new_no_decay", "gate", "gate_no_decay"}


def test_the_encoder_may_have_a_rate_of_its_own() -> None:
    model = tiny()
    model.add_second_branch(DualOptions(memory_layers=1))
    student = Student(model, EVERYTHING)
    groups = {g["name"]: g for g in parameter_groups(student, OptimOptions(lr=1.0, lr_encoder=4.0, lr_new=2.0))}
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    apart = {names[id(p)] for key in ("encoder", "encoder_no_decay") for p in groups[key]["params"]}
    second = ("model.encoder.secondary", "model.encoder.mixture")
    assert apart == {n for n in names.values() if n.startswith("model.encoder.") and not n.startswith(second)}
    assert groups["encoder"]["peak_lr"] == 4.0 and groups["old"]["peak_lr"] == 1.0


def test_the_rate_warms_up_and_falls() -> None:
    factors = [rate_factor(step, 100, 10, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and factors[10] == 1.0
    assert factors[100] == pytest.approx(0.1) and factors[55] == pytest.approx(0.55)
    assert factors[9:] == sorted(factors[9:], reverse=True)


def test_a_bad_step_leaves_weights_and_moments_alone() -> None:
    module = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(module, OptimOptions(lr=0.1))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    module.weight.grad, module.bias.grad = torch.ones(2, 2), torch.ones(2)
    optimizer_step(optimizer, scaler, torch.tensor(False))
    weight, moment = module.weight.detach().clone(), optimizer.state[module.weight]["exp_avg"].clone()
    module.weight.grad = torch.full((2, 2), math.nan)
    optimizer_step(optimizer, scaler, torch.tensor(True))
    assert torch.equal(module.weight, weight) and torch.equal(optimizer.state[module.weight]["exp_avg"], moment)
    module.weight.grad = torch.ones(2, 2)
    optimizer_step(optimizer, scaler, torch.tensor(False))
    assert not torch.equal(module.weight, weight) and optimizer.state[module.weight]["step"].item() == 2


def test_flops_against_torch_own_count() -> None:
    dims = ModelDimensions(80, 60, 64, 2, 2, 500, 32, 64, 2, 2)
    for dual in (None, DualOptions(), DualOptions(memory_layers=1)):
        # torch counts attention only where it is spelt out
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            Whisper(dims, dual)(torch.randn(1, 80, 120), torch.zeros(1, 16, dtype=torch.long))
        # torch counts causal attention in full: 2 layers of 2 n n d more
        expected = forward_flops(dims, dual, 60, 16) + 2 * 2 * 16 * 16 * 64
        assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
