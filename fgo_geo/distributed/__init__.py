"""Training on many processes: sharded models whose weights stay on their manifolds.

DistributedDataParallel needs nothing of this. For FSDP2, :func:`fully_shard` takes the place of torch's function of the
same name; :class:`~fgo_geo.RiemannianFGSGD` and :func:`~fgo_geo.on_manifolds` then step the shards, with the step of
one process.
"""

from fgo_geo.distributed.checkpoints import TrainingState
from fgo_geo.distributed.exchange import WeightExchange
from fgo_geo.distributed.owners import owners_of, step_cost
from fgo_geo.distributed.sharding import declare_plain, fully_shard
from fgo_geo.optim.base import exchange_by

__all__ = ["TrainingState", "declare_plain", "fully_shard", "owners_of", "step_cost"]

exchange_by(WeightExchange)
