#!/usr/bin/env bash
# The steps of a release, as .github/workflows/wheels.yml takes them.
#
#   release.sh check TAG            fail unless TAG, changelog and addresses are ready to publish
#   release.sh notes                print the changelog of this version, with links to the repository
#   release.sh sdist                build dist/*.tar.gz, and check it; it has git's files, no other
#   release.sh wheel                build a wheel for this machine, and check it (Linux)
#   release.sh toolkit FOLDER       install a CUDA 13 toolkit from pip's packages
#   release.sh local-version WORD   name this build 0.2.0+WORD, for a wheel beyond PyPI's
#
# sdist and wheel need pip install ".[release]", and take torch from this environment.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' at_fused/_version.py)
address=$(sed -n 's/^Repository = "\(.*\)"/\1/p' pyproject.toml)

fail() {
  echo "release.sh: $*" >&2
  exit 1
}

case "${1-} $#" in
  "check 2")
    [ "$2" = "v$version" ] || fail "the tag is $2, at_fused/_version.py has $version"
    grep -qE "^## $version \([0-9]{4}-[0-9]{2}-[0-9]{2}\)$" CHANGELOG.md ||
      fail "CHANGELOG.md has no line '## $version (YYYY-MM-DD)'"
    [[ -n $address && $address != *example.org* ]] ||
      fail "fill in the repository's address in pyproject.toml, [project.urls]"
    ;;
  "notes 1")
    notes=$(awk -v title="## $version " \
      'index($0, title) == 1 {on = 1; next} /^## / {on = 0} on' CHANGELOG.md)
    [ -n "$notes" ] || fail "CHANGELOG.md has no text for $version"
    sed -E "s#\]\(([^):]+)\)#]($address/blob/v$version/\1)#g" <<< "$notes"
    ;;
  "sdist 1")
    rm -f dist/*.tar.gz
    AT_FUSED_CPP=0 python -m build --sdist --no-isolation
    python -m twine check --strict dist/*.tar.gz
    export LC_ALL=C
    diff <(git ls-files | grep -v '^\.' | sort) \
      <(tar -tzf dist/*.tar.gz | sed 's|^[^/]*/||' | sort |
        grep -vE '/$|^$|^(PKG-INFO|setup\.cfg|at_fused\.egg-info/.*)$') ||
      fail "git (<) and the sdist (>) differ in the files above"
    ;;
  "wheel 1")
    rm -rf dist/unrepaired build  # build/ may have modules that were deleted since
    pip wheel --no-deps --no-build-isolation -w dist/unrepaired .
    python scripts/check_wheel.py dist/unrepaired/*.whl --out dist
    ;;
  "toolkit 2")
    [ ! -e "$2" ] || fail "$2 exists"
    packages=(nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl)
    python -m pip install -q --target "$2.packages" "${packages[@]/%/==13.0.*}"
    mv "$2.packages/nvidia/cu13" "$2"
    rm -rf "$2.packages"
    ln -s lib "$2/lib64"  # where torch's build looks
    "$2/bin/nvcc" --version
    ;;
  "local-version 2")
    sed -i "s/^__version__ = .*/__version__ = \"${version%%+*}+$2\"/" at_fused/_version.py
    ;;
  *) fail "usage: release.sh check TAG | notes | sdist | wheel | toolkit FOLDER | local-version WORD" ;;
esac
