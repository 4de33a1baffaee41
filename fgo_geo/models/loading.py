"""Messages about values in a state dict that are off a model's manifolds."""

from __future__ import annotations

__all__ = ["OF_AN_AVERAGE", "WITHOUT_PLAN"]

OF_AN_AVERAGE = (
    "the state_dict comes from a constrained model, so this may be an average of weights: load it into the object that "
    "it was saved from, or into a model that is not constrained; to train on, load "
    "plan_of(model).projected(state_dict), which moves it to the nearest points"
)
WITHOUT_PLAN = (
    "the state_dict carries no plan, as safetensors, Accelerate, distributed checkpoints and rebuilt dictionaries do "
    "not. If it was saved from a constrained model, give this one the same groups: constrain it with the same settings "
    "and seed, or call Plan.from_json(text).attach(model, project=True) with the plan that was saved with it; "
    'torch.nn.modules.utils.consume_prefix_in_state_dict_if_present strips "module." and keeps the plan. An '
    "average of weights is loaded as it is after plan_of(model).is_average = True. If it is neither, load plain "
    "weights before constrain(), or load plan_of(model).projected(state_dict)"
)
