"""Begin with the weights of argv[0], on every rank; each writes a digest of all that it then has into argv[1]."""

import hashlib
from pathlib import Path

from dist_trainer.distributed.world import World
from dist_trainer.errors import UserError
from dist_trainer.models import ModelConfig, build_model
from dist_trainer.models.pretrained import load_pretrained
from dist_trainer.storage.storage import Storage


def main(world: World, argv: list[str]) -> None:
    source, folder = argv[0], Path(argv[1])
    config = ModelConfig(name="small_resnet", pretrained=source)
    model = build_model(config, 7, seed=world.rank)
    load_pretrained(config, Storage(), model, world)
    data = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    (folder / f"{world.rank}.digest").write_text(hashlib.sha256(data).hexdigest())
    try:
        load_pretrained(ModelConfig(name="small_resnet", pretrained=f"{source}.no"), Storage(), model, world)
    except UserError as error:
        (folder / f"{world.rank}.error").write_text(str(error))
