# Two commands do everything on a Debian 12 machine, as root:
#   make demo   manifests to running Linux VMs, a drift found and healed; all of it shown
#   make test   every test, those that need a whole KVM host included
.PHONY: demo test setup build lab lint bench clean

demo: build lab
	@demo/run

test: lint build lab
	@tests/run

# What is missing of compilers and tools, from Debian's packages.
setup:
	@tests/setup

build: setup
	@cargo build --release --bins --quiet

# A KVM host to test in, and guests for it (tests/lab/README.md). Cached.
lab: setup
	@tests/lab/build

lint: setup
	@cargo fmt --check
	@cargo clippy --quiet --all-targets -- -D warnings

bench: build lab
	@benches/run

clean:
	@cargo clean --quiet
