"""Training on many processes: sharded models whose weights stay on their manifolds.

DistributedDataParallel does not need this package. For FSDP2, :func:`fully_shard` replaces torch's function of the same
name; :class:`~fgo_geo.RiemannianFGSGD` and :func:`~fgo_geo.on_manifolds` then take the same steps on the shards as on
one process.
"""

from fgo_geo.distributed.checkpoints import TrainingState
from fgo_geo.distributed.exchange import WeightExchange
from fgo_geo.distributed.owners import owners_of, step_cost
from fgo_geo.distributed.sharding import declare_plain, fully_shard
from fgo_geo.optim.base import exchange_by

__all__ = ["TrainingState", "declare_plain", "fully_shard", "owners_of", "step_cost"]

exchange_by(WeightExchange)
