"""Controls of the study: steps without radial part, a spike, and the norm that τ comes from."""

from __future__ import annotations

import pytest
import torch
import trainer
from trainer import command_line, engine, settings

SMALL = {"width": 4, "fraction": 0.1, "batch_size": 16, "epochs": 2, "device": "cpu"}


def steps(flags, count):
    """A run after some steps, with the weights before the last of them."""
    run = engine.build(command_line.make({**SMALL, **flags}))
    run.order.epoch = 1
    before = {}
    for number, (images, labels) in enumerate(run.batches):
        if number == count:
            return run, before
        before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
        engine.take_step(run, images, labels)
    raise AssertionError("too few batches")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_tangent_steps_have_no_part_along_the_weights(optimizer):
    run, before = steps({"optimizer": optimizer, "tangent_steps": True, "lr": 0.05}, 3)
    plain, plain_before = steps({"optimizer": optimizer, "lr": 0.05}, 3)
    for name, weight in run.model.named_parameters():
        step = (weight - before[name]).detach()
        assert step.abs().max() > 0
        if weight.ndim == 4:
            for channel, direction in zip(step, before[name], strict=True):
                assert abs((channel * direction).sum()) < 1e-6 * direction.norm() ** 2
            other = (plain.model.get_parameter(name) - plain_before[name]).detach()
            assert (other * plain_before[name]).sum().abs() > 1e-4 * other.norm() * plain_before[name].norm()


def test_tangent_steps_are_refused_where_steps_are_tangent_already():
    with pytest.raises(settings.SettingsError, match="tangent-steps is for the free steps"):
        command_line.make({"tangent_steps": True})


def test_a_spike_multiplies_the_gradient_of_one_step():
    common = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.001, "schedule": "constant"}
    moved = {}
    for spike in (1.0, 10.0):
        run = engine.build(command_line.make({**SMALL, **common, "spike": spike}))
        images, labels = next(iter(run.batches))
        for epoch, batch in ((1, 0), (2, 1), (2, 0)):
            run.progress.epoch, run.progress.batch = epoch, batch
            before = [weight.detach().clone() for weight in run.model.parameters()]
            engine.take_step(run, images, labels)
            moved[spike, epoch, batch] = [
                weight.detach() - old for weight, old in zip(run.model.parameters(), before, strict=True)
            ]
    for epoch, batch, factor in ((1, 0, 1), (2, 1, 1), (2, 0, 10)):
        for mild, wild in zip(moved[1.0, epoch, batch], moved[10.0, epoch, batch], strict=True):
            torch.testing.assert_close(wild, factor * mild, rtol=1e-2, atol=2e-6)


def test_the_running_norm_is_handed_to_the_optimiser():
    for norm in ("batch", "running"):
        run = engine.build(command_line.make({**SMALL, "method": "st", "step_norm": norm}))
        assert [group["norm"] for group in run.optimizer.param_groups] == [norm]
    with pytest.raises(settings.SettingsError, match="step-norm"):
        command_line.make({"optimizer": "sgd", "step_norm": "running"})


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "fgsgd", "rsgd", "radam"])
def test_biases_have_a_learning_rate_of_their_own(optimizer):
    run = engine.build(command_line.make({**SMALL, "optimizer": optimizer, "lr": 0.02, "bias_lr": 0.25}))
    rates = {id(w): group["lr"] for group in run.optimizer.param_groups for w in group["params"]}
    assert {n: rates[id(w)] for n, w in run.model.named_parameters()} == {
        n: pytest.approx(0.005 if n.endswith("bias") else 0.02) for n, _ in run.model.named_parameters()
    }
    for _, (images, labels) in zip(range(3), run.batches, strict=False):
        engine.take_step(run, images, labels)
    first, second = run.scheduler.get_last_lr()
    assert second == pytest.approx(first / 4)
    assert first < 0.02


def test_frozen_weights_stay_as_they_are():
    flags = {**SMALL, "model": "plain", "depth": 4, "method": "st", "lr": 0.1}
    for frozen in ((), ("biases",), ("first", "classifier"), ("constrained",)):
        run, _ = steps({**flags, "freeze": list(frozen)}, 3)
        start = engine.build(command_line.make({**SMALL, **flags})).model
        same = {
            name
            for name, weight in run.model.named_parameters()
            if torch.equal(weight.detach(), start.get_parameter(name).detach())
        }
        kinds = trainer.models.weights_by_kind(run.model)
        assert same == {name for kind in frozen for name in kinds[kind]}
    assert {name for names in kinds.values() for name in names} == dict(run.model.named_parameters()).keys()
