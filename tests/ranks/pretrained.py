"""Run under torchrun: begin with the weights of argv[1], on every rank; each writes a digest of all it then has."""

import hashlib
import sys
from pathlib import Path

from dist_trainer.distributed.world import init_world, shutdown_world
from dist_trainer.errors import UserError
from dist_trainer.models import ModelConfig, build_model
from dist_trainer.models.pretrained import load_pretrained
from dist_trainer.storage.storage import Storage

if __name__ == "__main__":
    source, folder = sys.argv[1], Path(sys.argv[2])
    world = init_world()
    config = ModelConfig(name="small_resnet", pretrained=source)
    model = build_model(config, 7, seed=world.rank)
    load_pretrained(config, Storage(), model, world)
    data = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    (folder / f"{world.rank}.digest").write_text(hashlib.sha256(data).hexdigest())
    try:
        load_pretrained(ModelConfig(name="small_resnet", pretrained=f"{source}.no"), Storage(), model, world)
    except UserError as error:
        (folder / f"{world.rank}.error").write_text(str(error))
    shutdown_world()
