"""What all ranks get from rank 0."""

from running import run_ranks


def test_tensors_of_rank_0_arrive_with_every_type_and_shape() -> None:
    """In one message, in some, and each in its own; a mistake of rank 0's is one of every rank. Mutations: bytes that
    are not aligned; a message that leaves out its last tensor.
    """
    run_ranks(3, "tensors_of_rank_0")
