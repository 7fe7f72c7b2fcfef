"""`python -m isotune.cli`, for launchers: `torchrun --nproc-per-node 2 -m isotune.cli train recipe.yaml`."""

from isotune.cli.app import main

if __name__ == "__main__":
    main()
