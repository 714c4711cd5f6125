# parley: build, test, install.  BUILD=release|debug|asan|tsan
BUILD ?= release
B := build/$(BUILD)
CC ?= gcc
PKGS := libmicrohttpd jansson libpcre2-8
CPPFLAGS := -D_GNU_SOURCE -I. -I$(B)
WARN := -Wall -Wextra -Wshadow -Wvla -Wmissing-prototypes -Wformat=2 -Werror=implicit -Werror=format-security
HARDEN := -fstack-protector-strong -fstack-clash-protection -fcf-protection=full -fPIE
MODE_release := -O2 -g -D_FORTIFY_SOURCE=3 $(HARDEN)
MODE_debug := -O0 -g3
MODE_asan := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
MODE_tsan := -O1 -g -fno-omit-frame-pointer -fsanitize=thread
CFLAGS := -std=gnu17 $(MODE_$(BUILD)) $(WARN) $(EXTRA_CFLAGS)
PKG_CFLAGS := $(shell pkg-config --cflags $(PKGS))
LIBS := $(shell pkg-config --libs $(PKGS)) -lm -pthread
LDFLAGS_release := -pie -Wl,-z,relro,-z,now,-z,noexecstack
LDFLAGS := $(MODE_$(BUILD)) $(LDFLAGS_$(BUILD))

core_src := $(wildcard core/*/*.c core/device/cpu/*.c)
config_src := $(wildcard config/*.c)
server_src := $(wildcard server/*.c server/api/*.c)
cli_src := $(wildcard cli/*.c)
unit_src := $(wildcard tests/unit/*.c)
ops_src := $(wildcard tests/ops/*.c)
tool_src := $(wildcard tests/tools/*.c)
obj = $(patsubst %.c,$(B)/%.o,$(1))

all: $(B)/parleyd $(B)/parley build/parleyd build/parley

# kernels for one instruction set each; which one runs is decided at run time
$(B)/core/device/cpu/%_avx2.o: CFLAGS += -mavx2 -mfma -mf16c -ffp-contract=off
$(B)/core/device/cpu/%_avx512.o: CFLAGS += -march=x86-64-v4 -mavx512vnni -mavx512bf16 -ffp-contract=off
$(B)/core/device/cpu/%.o: CFLAGS += -O3

$(B)/%.o: %.c $(B)/.flags
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) $(PKG_CFLAGS) -MMD -MP -c $< -o $@

$(B)/libparley.a: $(call obj,$(core_src))
	@rm -f $@
	$(AR) rcs $@ $^

$(B)/parleyd: $(call obj,$(server_src) $(config_src)) $(B)/libparley.a
	$(CC) $(LDFLAGS) $^ $(LIBS) -o $@

$(B)/parley: $(call obj,$(cli_src) $(config_src)) $(B)/libparley.a
	$(CC) $(LDFLAGS) $^ $(LIBS) -o $@

build/parleyd build/parley: build/%: $(B)/%
	ln -sfn $(BUILD)/$* $@

# the flags stamp: objects are rebuilt when the flags change
$(B)/.flags: FORCE
	@mkdir -p $(B)
	@echo '$(CC) $(CPPFLAGS) $(CFLAGS)' | cmp -s - $@ || echo '$(CC) $(CPPFLAGS) $(CFLAGS)' > $@

clean:
	rm -rf build

.PHONY: all clean FORCE
-include $(shell find $(B) -name '*.d' 2>/dev/null)
