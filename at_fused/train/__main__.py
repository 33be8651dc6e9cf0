"""Entry point of `python -m at_fused.train`, the same program as `at-fused-train`."""

from at_fused.train.cli import main

if __name__ == "__main__":
    main()
