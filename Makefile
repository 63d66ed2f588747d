# One-liners onto `cargo xtask`, which does all its own set-up. What is slow to make is kept outside the clone.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/hyper
export CARGO_TARGET_DIR ?= $(CACHE)/target

.PHONY: setup build run test lint fmt bench kernel
setup: ; cargo xtask setup
build: ; cargo xtask build
run: ; cargo xtask run
test: ; cargo xtask test
lint: ; cargo xtask lint
fmt: ; cargo fmt --all
bench: ; cargo xtask bench
kernel: ; cargo xtask kernel
