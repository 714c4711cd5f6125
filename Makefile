# parley: build, test, install.  BUILD=release|debug|asan|tsan
BUILD ?= release
B := build/$(BUILD)
CC ?= gcc
PYTHON ?= python3
PREFIX ?= /usr/local
PKGS := libmicrohttpd jansson libpcre2-8 sqlite3
CPPFLAGS := -D_GNU_SOURCE -I.
WARN := -Wall -Wextra -Wshadow -Wvla -Wmissing-prototypes -Wformat=2 -Wno-format-nonliteral -Werror=implicit -Werror=format-security
HARDEN := -fstack-protector-strong -fstack-clash-protection -fcf-protection=full -fPIE -D_FORTIFY_SOURCE=3
MODE_release := -O2 -g
MODE_debug := -O0 -g3
MODE_asan := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
MODE_tsan := -O1 -g -fno-omit-frame-pointer -fsanitize=thread
HARDEN_release := $(HARDEN)
LINK_release := -pie -Wl,-z,relro,-z,now,-z,noexecstack
CFLAGS := -std=gnu17 $(MODE_$(BUILD)) $(HARDEN_$(BUILD)) $(WARN) $(EXTRA_CFLAGS)
LDFLAGS := $(MODE_$(BUILD)) $(LINK_$(BUILD))
PKG_CFLAGS := $(shell pkg-config --cflags $(PKGS))
LIBS := $(shell pkg-config --libs $(PKGS)) -lm -pthread

# Kernels for one instruction set each (which one runs is decided at run time), and loops worth vectorising. A sum's order
# is part of the result, so the compiler may not contract or reorder; training may contract, its results are one processor's.
# Vectors wider than the set's registers stay inside their file: notes on how they would be passed (psabi) say nothing.
ISA_avx2 := -mavx2 -mfma -mf16c -ffp-contract=off
ISA_avxvnni := $(ISA_avx2) -mavxvnni
ISA_avx512 := -march=x86-64-v4 -mavx512vnni -ffp-contract=off
ISA = $(if $(filter core/device/% core/sample/%,$<),-O3 -Wno-psabi) $(if $(findstring _avx2.c,$<),$(ISA_avx2)) $(if $(findstring _avxvnni.c,$<),$(ISA_avxvnni)) $(if $(findstring _avx512.c,$<),$(ISA_avx512)) $(if $(findstring cpu/train,$<),-ffp-contract=fast)

sources = $(foreach d,$(1),$(wildcard $(d)/*.c))
objects = $(patsubst %.c,$(B)/%.o,$(1))
core_obj := $(call objects,$(call sources,core/base core/model core/text core/device core/device/cpu core/kv core/sched core/sample core/train core/comm))
config_obj := $(call objects,$(call sources,config))
server_obj := $(call objects,$(call sources,server server/api server/jobs))
cli_obj := $(call objects,$(call sources,cli))
unit_src := $(wildcard tests/unit/*.c)
tool_main := $(filter-out tests/tools/gguf_write.c tests/tools/tiny_%.c tests/tools/run_model.c tests/tools/emulated.c,$(wildcard tests/tools/*.c))
tool_obj := $(call objects,$(filter-out $(tool_main),$(wildcard tests/tools/*.c)))
TOOLS := $(patsubst tests/tools/%.c,$(B)/%,$(tool_main))

all: $(B)/parleyd $(B)/parley build/parleyd build/parley mpi

$(B)/%.o: %.c $(B)/.flags
	@mkdir -p $(@D)
	@echo "cc $<"
	@$(CC) $(CPPFLAGS) $(CFLAGS) $(ISA) $(PKG_CFLAGS) -MMD -MP -c $< -o $@

$(B)/core/train/general.o: data/general.txt

$(B)/libparley.a: $(core_obj)
	@rm -f $@
	ar rcs $@ $^

$(B)/parleyd: $(server_obj) $(config_obj) $(B)/libparley.a
	$(CC) $(LDFLAGS) $^ $(LIBS) -o $@

$(B)/parley: $(cli_obj) $(B)/libparley.a
	$(CC) $(LDFLAGS) $^ $(LIBS) -o $@

build/parleyd build/parley: build/%: $(B)/%
	ln -sfn $(BUILD)/$* $@

# ---- ranks as MPI processes: a library of its own, loaded at run time; built where there is MPI -----------------------------
MPI ?= $(if $(shell command -v mpicc),1,0)
ifeq ($(MPI),1)
$(B)/libparley_mpi.so: core/comm/mpi/plugin.c core/comm/link.h $(B)/.flags
	OMPI_CC=$(CC) MPICH_CC=$(CC) mpicc $(CPPFLAGS) -std=gnu17 -O2 -g $(WARN) -fPIC -shared -fvisibility=hidden -Wl,-z,relro,-z,now $< -o $@
build/libparley_mpi.so: $(B)/libparley_mpi.so
	ln -sfn $(BUILD)/libparley_mpi.so $@
mpi: build/libparley_mpi.so
else
mpi:
endif

# ---- the CUDA device: a library of its own, loaded at run time -----------------------------------------------------------
# By nvcc where there is one; and always by the host's compiler against stand-in headers, for tests (tests/cuda_emu). Both
# are of their own objects, position independent, and carry the few plain modules of core that they call.
NVCC ?= nvcc
CUDA_HOME ?= $(shell $(NVCC) -dryrun -x cu /dev/null 2>&1 | sed -n 's/^\#\$$ TOP=//p')
# Compute capabilities 7.5 to 12.x: code for each, and PTX for what has none (8.7, 8.8, 12.1 and what is still to come).
CUDA_CODE := 75 80 86 89 90 100 103 110 120
CUDA_PTX := 75 80 120
# CUDA_ONLY=90, for gpu-kit and tests/gpu/run: code for that one alone, in a folder of its own. Takes a tenth of the time.
CUDA_ONLY ?=
CUDA_GENCODE := $(foreach a,$(or $(CUDA_ONLY),$(CUDA_CODE)),-gencode arch=compute_$(a),code=sm_$(a)) $(if $(CUDA_ONLY),,$(foreach a,$(CUDA_PTX),-gencode arch=compute_$(a),code=compute_$(a)))
GPU := $(B)/gpu$(CUDA_ONLY)
CUDA_LIBRARY := $(if $(CUDA_ONLY),$(GPU),$(B))/libparley_cuda.so
CUDA_CFLAGS := -std=gnu17 $(MODE_$(BUILD)) -fPIC -fvisibility=hidden $(WARN) -Werror $(EXTRA_CFLAGS)
NVCC_FLAGS := -std=c++17 -O3 -lineinfo $(CUDA_GENCODE) -Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unused-parameter -Xfatbin -compress-all --threads 2
EMU := -Itests/cuda_emu/include
EMU_CXXFLAGS := -std=gnu++17 $(MODE_$(BUILD)) -march=native -fPIC -fvisibility=hidden -ffp-contract=off -fsanitize=alignment,bounds -fno-sanitize-recover=alignment,bounds -Wall -Wextra -Werror -Wno-unknown-pragmas $(EXTRA_CFLAGS)
cuda_core := $(addprefix core/,base/status.c base/log.c base/buf.c base/utf8.c model/dtype.c)
cuda_c := $(call sources,cuda)
cuda_cu := $(wildcard cuda/*.cu)
cuda_obj := $(patsubst %,$(GPU)/%.o,$(cuda_c) $(cuda_cu) $(cuda_core))
emu_obj := $(patsubst %,$(B)/emu/%.o,$(filter-out cuda/blas.c,$(cuda_c)) $(cuda_cu) $(cuda_core) $(wildcard tests/cuda_emu/*.c tests/cuda_emu/*.cpp))

$(GPU)/%.c.o: %.c $(B)/.flags
	@mkdir -p $(@D)
	@echo "cc $< (CUDA)"
	@$(CC) $(CPPFLAGS) $(CUDA_CFLAGS) -isystem $(CUDA_HOME)/include -MMD -MP -c $< -o $@
$(GPU)/%.cu.o: %.cu $(B)/.flags
	@mkdir -p $(@D)
	@echo "nvcc $<"
	@$(NVCC) $(CPPFLAGS) $(NVCC_FLAGS) -MMD -MP -c $< -o $@
$(CUDA_LIBRARY): $(cuda_obj)
	$(CXX) -shared -Wl,--as-needed -Wl,-z,relro,-z,now,-z,defs $^ -L$(CUDA_HOME)/lib64 -lcudart_static -lpthread -ldl -lrt -o $@

$(B)/emu/%.c.o: %.c $(B)/.flags
	@mkdir -p $(@D)
	@echo "cc $< (emulated CUDA)"
	@$(CC) $(CPPFLAGS) $(CUDA_CFLAGS) $(EMU) -MMD -MP -c $< -o $@
$(B)/emu/%.cu.o: %.cu $(B)/.flags
	@mkdir -p $(@D)
	@echo "c++ $< (emulated CUDA)"
	@$(CXX) $(CPPFLAGS) $(EMU_CXXFLAGS) $(EMU) -MMD -MP -x c++ -c $< -o $@
$(B)/emu/%.cpp.o: %.cpp $(B)/.flags
	@mkdir -p $(@D)
	@echo "c++ $< (emulated CUDA)"
	@$(CXX) $(CPPFLAGS) $(EMU_CXXFLAGS) $(EMU) -MMD -MP -c $< -o $@
$(B)/libparley_cuda_emu.so: $(emu_obj)
	$(CXX) -shared -Wl,-z,defs -Wl,-soname,$(@F) $(MODE_$(BUILD)) -fsanitize=alignment,bounds $^ -lpthread -o $@
# What the emulation itself must notice
$(B)/emu_check: $(patsubst %,$(B)/emu/%.o,$(addprefix tests/cuda_emu/,check.cu runtime.c graphs.c emu.cpp) $(cuda_core))
	$(CXX) $(MODE_$(BUILD)) -fsanitize=alignment,bounds $^ -lpthread -o $@
# A stand-in for NCCL between threads; tests name its folder in LD_LIBRARY_PATH.
$(B)/nccl_emu/libnccl.so.2: tests/cuda_emu/nccl/nccl.c $(B)/libparley_cuda_emu.so
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CUDA_CFLAGS) $(EMU) -shared -Wl,-z,defs -Wl,-soname,$(@F) -Wl,-rpath,'$$ORIGIN/..' $^ -lpthread -o $@

cuda: $(CUDA_LIBRARY)
	ln -sfn $(CUDA_LIBRARY:build/%=%) build/libparley_cuda.so
# What tests/gpu/run --built needs, for a machine that has a GPU but nothing to build with: programs, and those of their libraries that it may lack
gpu-kit: $(B)/parley $(B)/ops $(B)/logits $(B)/make_model $(CUDA_LIBRARY)
	rm -rf build/gpu-kit
	mkdir -p build/gpu-kit/lib
	for f in $^; do strip -g -o build/gpu-kit/$${f##*/} $$f; done
	ldd $^ | awk '$$2 == "=>" && $$3 ~ "^/" && $$1 !~ "^lib(c|m|dl|rt|pthread|gcc_s|stdc\\+\\+)\\.so" {print $$3}' | sort -u | xargs -r cp -Lt build/gpu-kit/lib
cuda-emu: $(B)/libparley_cuda_emu.so $(B)/nccl_emu/libnccl.so.2

# ---- tests --------------------------------------------------------------------------------------------------------------
# The runner's list of suites is what tests/unit/check_*.c is: each exports suite_<module>().
$(B)/suites.h: $(unit_src)
	@mkdir -p $(B)
	@for f in $(patsubst tests/unit/check_%.c,%,$(filter tests/unit/check_%.c,$(unit_src))); do echo "SUITE($$f)"; done > $@

$(B)/tests/unit/main.o: CPPFLAGS += -I$(B)
$(B)/tests/unit/main.o: $(B)/suites.h
$(B)/unit: $(call objects,$(unit_src)) $(tool_obj) $(config_obj) $(addprefix $(B)/server/,schema.o prompt.o apierr.o gen_text.o multipart.o jobs/retry.o jobs/share.o) $(B)/libparley.a
	$(CC) $(LDFLAGS) -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc $^ $(LIBS) $(shell pkg-config --libs check) -o $@

$(B)/ops: $(call objects,$(wildcard tests/ops/*.c)) $(B)/tests/tools/emulated.o $(B)/libparley.a
	$(CC) $(LDFLAGS) $^ $(LIBS) -o $@

$(TOOLS): $(B)/%: $(B)/tests/tools/%.o $(tool_obj) $(B)/libparley.a
	$(CC) $(LDFLAGS) $^ $(LIBS) -o $@

# Benchmarks: the machine's ceilings, and a load generator for compare.
$(B)/calibrate: $(addprefix $(B)/,tests/bench/calibrate.o cli/peak.o libparley.a)
	$(CC) $(LDFLAGS) $^ $(LIBS) -o $@
$(B)/load: $(addprefix $(B)/,tests/bench/load.o libparley.a)
	$(CC) $(LDFLAGS) $^ $(LIBS) -o $@
bench-tools: all $(B)/calibrate $(B)/load

# Libraries that make system calls, or allocations, fail, for LD_PRELOAD.
PRELOADS := $(patsubst tests/tools/preload/%.c,$(B)/%.so,$(wildcard tests/tools/preload/*.c))
$(PRELOADS): $(B)/%.so: tests/tools/preload/%.c
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) -std=gnu17 -O1 -fPIC -shared $(WARN) $< -ldl -o $@

tools: $(TOOLS) $(PRELOADS)
test-unit: $(B)/unit $(if $(filter release,$(BUILD)),cuda-emu)
	$(B)/unit
ops: $(B)/ops $(B)/emu_check cuda-emu
	$(B)/emu_check
	$(B)/ops
# Errors planted in the kernels of cuda/, one at a time: do the operation table, or training's suites, notice?
mutants: $(B)/ops $(B)/unit cuda-emu
	$(PYTHON) tests/cuda_emu/mutate.py --ops $(B)/ops --unit $(B)/unit --out $(B)/mutants --objects '$(emu_obj)' --link '$(CXX) -shared -Wl,-z,defs -fsanitize=alignment,bounds' \
	    --cc '$(CC) $(CPPFLAGS) $(CUDA_CFLAGS) $(EMU)' --cxx '$(CXX) $(CPPFLAGS) $(EMU_CXXFLAGS) $(EMU) -x c++'
test-http: all tools bench-tools cuda-emu
	PARLEYD=$(B)/parleyd PARLEY_TOOLS=$(B) $(PYTHON) -m pytest -q tests/http
# The server's tests that say most about a device, with the CUDA device on a CPU
test-http-emulated: all tools cuda-emu
	PARLEY_TEST_DEVICE=cuda-emulated PARLEYD=$(B)/parleyd PARLEY_TOOLS=$(B) $(PYTHON) -m pytest -q tests/http/test_adapters.py tests/http/test_equality.py -k 'not real'
test: test-unit ops lint test-http test-http-emulated
# The fine-tuning API under faults, with more kills than test-http has. PARLEY_SEED=N replays a run.
faults: all tools
	PARLEYD=$(B)/parleyd PARLEY_TOOLS=$(B) PARLEY_KILLS=20 $(PYTHON) -m pytest -q -s tests/http/test_faults.py
oracle: all tools
	$(PYTHON) tests/oracle/run_all.py
bench: bench-tools $(B)/unit
	tests/bench/compare --json build/bench.json --markdown build/bench.md
lint:
	sh tests/lint/lint.sh

install: all
	install -D -m 755 $(B)/parleyd $(DESTDIR)$(PREFIX)/bin/parleyd
	install -D -m 755 $(B)/parley $(DESTDIR)$(PREFIX)/bin/parley
	if [ -e $(B)/libparley_mpi.so ]; then install -D -m 755 $(B)/libparley_mpi.so $(DESTDIR)$(PREFIX)/lib/parley/libparley_mpi.so; fi
	if [ -e $(B)/libparley_cuda.so ]; then install -D -m 755 $(B)/libparley_cuda.so $(DESTDIR)$(PREFIX)/lib/parley/libparley_cuda.so; fi
	if [ ! -e $(DESTDIR)/etc/parley/parley.conf ]; then install -D -m 640 deploy/parley.conf $(DESTDIR)/etc/parley/parley.conf; fi

clean:
	rm -rf build

help:
	@echo 'all (default), cuda, cuda-emu, gpu-kit, mpi, test, test-unit, ops, mutants, test-http, test-http-emulated, faults, oracle, bench, bench-tools, lint, tools, install, clean; BUILD=release|debug|asan|tsan'

# The flags stamp: objects are rebuilt when the flags change. It is written while this is read, so that `make -q all` can say yes.
FLAGS := $(CC) $(CPPFLAGS) $(CFLAGS)
ifneq ($(strip $(shell cat $(B)/.flags 2>/dev/null)),$(strip $(FLAGS)))
$(shell mkdir -p $(B) && echo '$(FLAGS)' > $(B)/.flags)
endif
$(B)/.flags: # after clean, in one call of make
	@mkdir -p $(@D)
	@echo '$(FLAGS)' > $@

# A link that leads to another build is made anew, however new what it leads to.
.PHONY: $(foreach l,build/parleyd build/parley build/libparley_mpi.so,$(if $(filter $(BUILD)/%,$(shell readlink $(l))),,$(l)))
.PHONY: all test-http-emulated mpi cuda cuda-emu gpu-kit mutants tools test test-unit ops test-http faults oracle bench bench-tools lint install clean help
.SECONDARY:
-include $(shell find $(B) -name '*.d' 2>/dev/null)
