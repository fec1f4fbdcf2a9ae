PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_INSTALL = -m pip install -q --disable-pip-version-check --no-compile
# What is imported is compiled once, and not all that is installed.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint install bundles wheel-test cuda-test hosts release clean

demo: install  ## export the demo model and let it tell a story
	$(BIN)/export-onnx demo -o build/demo --force
	$(BIN)/gptedge generate build/demo "One windy day, Leo" -n 200

# Asked for together, also with -j: hosts before test, and test before wheel-test.
test: install lint bundles $(filter hosts,$(MAKECMDGOALS))  ## linters, types, import contract, all tests, in two processes
	GPTEDGE_TEST_BUNDLES=$(CURDIR)/build/test-bundles OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -e ".[cpu,export,test]"
	touch $@

bundles: install  ## what the tests read, made once for all that run
	$(BIN)/python tests/make_bundles.py build/test-bundles

# All other tests run with the newest onnxruntime; 1.27 is the oldest that reads int8 and int4, and 1.23 the oldest of all.
wheel-test: install bundles $(filter test,$(MAKECMDGOALS))  ## the runtime's tests but the longest against the built wheel and the oldest onnxruntime, without PyTorch
	rm -rf build/wheel && $(BIN)/python -m pip wheel -q --no-deps -w build/wheel .
	$(PYTHON) -m venv --clear build/wheel-venv
	build/wheel-venv/bin/python $(PIP_INSTALL) "$$(echo build/wheel/gptedge-*.whl)[cpu]" "onnxruntime==1.27.*" pytest pytest-timeout pytest-xdist hypothesis
	! build/wheel-venv/bin/python -c "import torch" 2>/dev/null
	GPTEDGE_TEST_BUNDLES=$(CURDIR)/build/test-bundles build/wheel-venv/bin/python -P -m pytest -q -n 2 --dist loadfile tests/runtime -k "not ten_thousand_rows"
	build/wheel-venv/bin/python $(PIP_INSTALL) "onnxruntime==1.23.*; python_version < '3.14'"
	GPTEDGE_TEST_BUNDLES=$(CURDIR)/build/test-bundles build/wheel-venv/bin/python -P -m pytest -q -n 2 --dist loadfile tests/runtime/test_bundle.py tests/runtime/test_generate.py tests/runtime/test_session.py -k "not int8 and not int4"

cuda-test: install bundles  ## with onnxruntime-gpu: on a GPU parity and ids, without one what is said about it
	$(PYTHON) -m venv --clear build/cuda-venv
	rm -rf build/wheel && $(BIN)/python -m pip wheel -q --no-deps -w build/wheel .
	build/cuda-venv/bin/python $(PIP_INSTALL) "$$(echo build/wheel/gptedge-*.whl)[cuda]" pytest pytest-timeout hypothesis
	$(BIN)/python tests/make_bundles.py build/test-bundles/cuda --cuda
	GPTEDGE_TEST_BUNDLES=$(CURDIR)/build/test-bundles build/cuda-venv/bin/python -P -m pytest -q tests/gpu tests/runtime/test_provider.py

hosts: install  ## Node, a browser, C and other runtimes: without them the tests of the examples are skipped by name
	tests/examples/setup.sh $(BIN)/python

release: install  ## the wheel, and the bill of materials of what it installs on a device
	rm -rf dist build/sbom && $(BIN)/python -m pip wheel -q --no-deps -w dist .
	$(PYTHON) -m venv build/sbom && build/sbom/bin/pip install -q "$$(echo dist/gptedge-*.whl)[cpu]"
	$(BIN)/pip install -q cyclonedx-bom
	$(BIN)/cyclonedx-py environment build/sbom/bin/python --pyproject pyproject.toml --output-reproducible -o dist/sbom.cdx.json

clean:
	rm -rf build $(VENV)
