# What this site needs before Python: sourced on every node by the batch scripts beside it. Edit it, or leave it out.
# module load cuda/12.6
# source ~/miniforge3/bin/activate dist_trainer    # or a venv: source /shared/venv/bin/activate
# export HTTPS_PROXY=http://proxy:3128              # nodes without a way out: shards from the web, W&B
# export WANDB_MODE=offline                         # or none at all
# export NCCL_SOCKET_IFNAME==ib0                    # derived from the route to the first node unless it is set here
