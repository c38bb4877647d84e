"""Answers that are kept and compared, against formulas in float64; and inputs that hold no data."""

import pytest
import torch

from eblora_hf.memory.anchor import Distribution, Features, positions_of, share_variance
from eblora_hf.memory.noise import random_inputs


def logits(*shape: int, seed: int) -> torch.Tensor:
    return 3.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_distance_is_the_divergence_at_a_temperature(seed, temperature):
    before, now = logits(6, 10, seed=seed), logits(6, 10, seed=seed + 100)
    p, q = (before / temperature).softmax(-1), (now / temperature).softmax(-1)
    expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    answers = Distribution.of(before, None, temperature)
    assert answers.distance(now).item() == pytest.approx(expected.item(), rel=1e-4)
    assert answers.distance(before).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_of_many_classes_the_likeliest_are_kept_and_the_rest_is_one(seed):
    before, now = logits(4, 500, seed=seed), logits(4, 500, seed=seed + 100)
    answers = Distribution.of(before, None, 2.0)
    assert answers.probabilities.shape == (4, 65)
    p, q = (before / 2).softmax(-1), (now / 2).softmax(-1)
    likeliest = p.argsort(-1, descending=True)[:, :64]
    p, q = (torch.cat([x.gather(-1, likeliest), 1 - x.gather(-1, likeliest).sum(-1, True)], -1) for x in (p, q))
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    assert answers.distance(now).item() == pytest.approx(expected.item(), rel=1e-4)
    assert answers.distance(before).item() == pytest.approx(0.0, abs=1e-5)


def test_the_gradient_is_finite_where_the_likeliest_are_certain():
    """Float32 knows nothing of the other 436 classes then: log(1 - 1)."""
    certain = torch.zeros(2, 500)
    certain[:, 0] = 200.0
    now = certain.clone().requires_grad_(True)
    distance = Distribution.of(certain, None, 1.0).distance(now)
    distance.backward()
    assert torch.isfinite(distance)
    assert torch.isfinite(now.grad).all()
    other = torch.zeros(2, 500)
    other[:, 1] = 200.0
    assert torch.isfinite(Distribution.of(other, None, 1.0).distance(now))


def test_of_a_sequence_64_positions_without_padding():
    mask = torch.zeros(2, 200, dtype=torch.long)
    mask[0, :150], mask[1, 195:] = 1, 1  # padded on either side
    positions = positions_of(torch.zeros(2, 200, 3), mask)
    first, second = positions[positions < 200], positions[positions >= 200] - 200
    assert len(first) == 64
    assert (first[0], first[-1]) == (0, 149)
    assert first.unique().numel() == 64
    assert second.tolist() == [195, 196, 197, 198, 199]
    before = logits(2, 200, 3, seed=0)
    now = torch.where(mask.bool()[..., None], before, logits(2, 200, 3, seed=1))  # differs in the padding alone
    assert Distribution.of(before, mask, 2.0).distance(now).item() == pytest.approx(0.0, abs=1e-6)


def test_a_mask_of_something_else_is_no_mask():
    assert len(positions_of(torch.zeros(2, 5, 3), torch.ones(2, 9))) == 10
    with pytest.raises(ValueError, match=r"the model gives \(2, 3, 4, 5\)"):
        positions_of(torch.zeros(2, 3, 4, 5), None)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_features_are_compared_by_their_variance(seed):
    before, now = logits(5, 7, 4, seed=seed), logits(5, 7, 4, seed=seed + 100)
    flat, moved = before.reshape(-1, 4), now.reshape(-1, 4)
    expected = ((moved - flat) ** 2).sum() / ((flat - flat.mean(0)) ** 2).sum()
    (answers,) = share_variance([Features.of(before, None)])
    assert answers.distance(now).item() == pytest.approx(expected.item(), rel=1e-5)
    assert answers.distance(before).item() == 0.0
    mean = flat.mean(0).expand_as(flat).reshape_as(before)
    assert answers.distance(mean).item() == pytest.approx(1.0, rel=1e-5)
    (one,) = share_variance([Features.of(before[:1, 0], None)])
    assert torch.isfinite(one.distance(now[:1, 0]))
    dealt = share_variance([Features.of(row.unsqueeze(0), None) for row in before])
    apart = [part.distance(row.unsqueeze(0)).item() for part, row in zip(dealt, now, strict=True)]
    assert sum(apart) / len(apart) == pytest.approx(expected.item(), rel=1e-5)  # however they are dealt out


def test_noise_has_the_scale_of_the_pictures_and_nothing_else():
    pictures = 3.0 + 0.5 * torch.randn(16, 3, 32, 32)
    pictures[:, 1] *= 4.0
    generator = torch.Generator().manual_seed(0)
    drawn = random_inputs({"pixel_values": pictures}, None, [], generator)["pixel_values"]
    over = (0, 2, 3)
    torch.testing.assert_close(drawn.mean(over), pictures.mean(over), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(drawn.std(over), pictures.std(over), rtol=1e-3, atol=1e-3)
    steps, noise = ((x[..., 1:] - x[..., :-1]).square().mean().sqrt() / x.std() for x in (drawn, pictures))
    assert steps < 0.5 * noise  # it is smooth
    correlation = torch.corrcoef(torch.stack([drawn.flatten(1)[0], pictures.flatten(1)[0]]))[0, 1]
    mixed = random_inputs({"pixel_values": pictures.flip(0)}, None, [], torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed["pixel_values"], drawn)  # whatever the rows show
    assert abs(correlation) < 1.0


def test_tokens_are_drawn_but_for_special_ones():
    tokens = torch.tensor([[1, 7, 7, 7, 2, 0], [1, 9, 2, 0, 0, 0]]).repeat(200, 1)
    inputs = {"input_ids": tokens, "attention_mask": (tokens != 0).long()}
    drawn = random_inputs(inputs, 12, [0, 1, 2], torch.Generator().manual_seed(0))
    special = tokens < 3
    assert torch.equal(drawn["input_ids"][special], tokens[special])
    assert set(drawn["input_ids"][~special].tolist()) == set(range(3, 12))
    assert drawn["attention_mask"] is inputs["attention_mask"]


def test_inputs_of_another_kind_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"the inputs are input_values. Pass a data set"):
        random_inputs({"input_values": torch.randn(2, 100)}, None, [], torch.Generator())
    tokens = torch.ones(2, 5, dtype=torch.long)
    for pictures, vocabulary in ((torch.randn(2, 2, 3, 8, 8), 60), (torch.randn(2, 3, 8, 8), None)):
        with pytest.raises(ValueError, match="the inputs are pixel_values, input_ids"):
            random_inputs({"pixel_values": pictures, "input_ids": tokens}, vocabulary, [], torch.Generator())
    both = {"input_ids": tokens, "decoder_input_ids": tokens}
    drawn = random_inputs(both, 60, [0], torch.Generator().manual_seed(0))
    assert not torch.equal(drawn["decoder_input_ids"], tokens)
