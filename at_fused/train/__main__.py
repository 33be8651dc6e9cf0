"""Makes `python -m at_fused.train` the same as `at-fused-train`."""

from at_fused.train.cli import main

if __name__ == "__main__":
    main()
