#!/usr/bin/env bash
# The steps of a release, as .github/workflows/wheels.yml takes them.
#
#   release.sh check TAG            fail unless TAG, changelog and addresses are ready to publish
#   release.sh sdist                build dist/*.tar.gz, and check it
#   release.sh wheel                build a wheel for this machine, and check it (Linux)
#   release.sh toolkit FOLDER       install a CUDA 13 toolkit from pip's packages
#   release.sh local-version WORD   name this build 0.2.0+WORD, for a wheel beyond PyPI's
#
# sdist and wheel need pip install ".[release]"; wheel takes torch from this environment.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' at_fused/_version.py)

fail() {
  echo "release.sh: $*" >&2
  exit 1
}

case "${1-} $#" in
  "check 2")
    [ "$2" = "v$version" ] || fail "the tag is $2, at_fused/_version.py has $version"
    grep -qE "^## $version \([0-9]{4}-[0-9]{2}-[0-9]{2}\)$" CHANGELOG.md ||
      fail "CHANGELOG.md has no line '## $version (YYYY-MM-DD)'"
    ! grep -q 'example\.org' pyproject.toml ||
      fail "fill in the repository's address in pyproject.toml, [project.urls]"
    ;;
  "sdist 1")
    rm -f dist/*.tar.gz
    AT_FUSED_CPP=0 python -m build --sdist
    python -m twine check --strict dist/*.tar.gz
    ;;
  "wheel 1")
    rm -rf dist/unrepaired
    pip wheel --no-deps --no-build-isolation -w dist/unrepaired .
    python scripts/check_wheel.py dist/unrepaired/*.whl --out dist
    ;;
  "toolkit 2")
    packages=(nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl)
    python -m pip install -q --target "$2.packages" "${packages[@]/%/==13.0.*}"
    mv "$2.packages/nvidia/cu13" "$2"
    rm -rf "$2.packages"
    ln -s lib "$2/lib64"  # where torch's build looks
    "$2/bin/nvcc" --version
    ;;
  "local-version 2")
    sed -i "s/^__version__ = .*/__version__ = \"$version+$2\"/" at_fused/_version.py
    ;;
  *) fail "usage: release.sh check TAG | sdist | wheel | toolkit FOLDER | local-version WORD" ;;
esac
