# Every target does its own set-up, in .venv; PYTHON is the Python to make it with.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: quickstart test test-slow test-native check format clean

quickstart: $(READY)
	$(BIN)/repvgg quickstart

# ncnn crashes in a process in which hundreds of other tests have run, and the threads that OpenVINO
# and MNN leave behind are better not there either; so the runtimes have a process of their own.
RUNTIMES := tests/test_runtimes.py

test: $(READY)
	$(BIN)/pytest -q -m "not slow" --durations=10 --ignore $(RUNTIMES)
	$(BIN)/pytest -q -m "not slow" $(RUNTIMES)

test-slow: $(READY)
	$(BIN)/pytest -q -m slow --durations=10 --ignore $(RUNTIMES)
	$(BIN)/pytest -q -m slow $(RUNTIMES)

# The engine without Python: its own tests, plainly and under sanitizers, an installed library with
# the C example, and NEON in an emulator where there are a cross-compiler and QEMU.
test-native: $(READY)
	cmake -S native -B build/native -DRVGG_TESTS=ON -DCMAKE_INSTALL_PREFIX=build/installed
	cmake --build build/native --parallel 2
	build/native/test_native 100
	cmake --install build/native
	PYTHON=$(BIN)/python native/tests/test_example.sh build/installed
	for kind in address,undefined thread; do \
		cmake -S native -B build/$$kind -DRVGG_TESTS=ON -DRVGG_SANITIZE=$$kind && \
		cmake --build build/$$kind --target test_native --parallel 2 && \
		build/$$kind/test_native 10 || exit 1; \
	done
	if command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; then \
		cmake -S native -B build/neon -DRVGG_TESTS=ON --toolchain tests/aarch64.cmake && \
		cmake --build build/neon --target test_native --parallel 2 && \
		qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/test_native 10; \
	else echo "NEON: not tested, no aarch64-linux-gnu-g++ or qemu-aarch64 here"; fi

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build quickstart

$(READY): pyproject.toml constraints.txt $(wildcard native/src/* native/CMakeLists.txt)
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer needed, found ' + sys.version.split()[0])"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)
