"""Messages about values in a state dict that do not lie on a model's manifolds."""

from __future__ import annotations

__all__ = ["OF_AN_AVERAGE", "WITHOUT_PLAN"]

OF_AN_AVERAGE = (
    "the state_dict comes from a constrained model, so this may be an average of weights: load it into the object that "
    "it was saved from, or into a model that is not constrained; to continue training from it, load "
    "plan_of(model).projected(state_dict), which moves it to the nearest points"
)
WITHOUT_PLAN = (
    "the state_dict carries no plan, as safetensors, Accelerate, distributed checkpoints and rebuilt dictionaries do "
    "not. If it was saved from a constrained model, give this one the same groups: constrain it with the same settings "
    "and seed, or call Plan.from_json(text).attach(model, project=True) with the plan that was saved with it; "
    'torch.nn.modules.utils.consume_prefix_in_state_dict_if_present strips "module." and keeps the plan. To load an '
    "average of weights unchanged, set plan_of(model).is_average = True. For weights of a plain model, load them "
    "before constrain(), or load plan_of(model).projected(state_dict)"
)
