# qemu-launcher: everything a person or a CI machine does with this tree. `make help` lists it.
#
# A fresh Debian 12 or 13 needs nothing but git and make: `make demo` and `make test` install what else they use, with
# apt (through sudo when you are not root) and with pip into .venv. Nothing else of the machine is changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

# CI runners may start us without HOME, or with an empty one.
ifeq ($(strip $(HOME)),)
HOME := $(or $(shell getent passwd "$$(id -u)" | cut -d: -f6),/root)
endif
export HOME

# The lab's images are large and slow to build, so they live outside the tree: the next fresh clone finds them again.
QEMU_LAUNCHER_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/qemu-launcher
export QEMU_LAUNCHER_CACHE

# The distribution's Python and no other (pyenv, conda): its dbus-next, prctl, yaml and rich are what the package uses.
PYTHON := /usr/bin/python3
VENV := .venv/bin
# mke2fs and debugfs are in sbin, which an ordinary user's PATH lacks.
export PATH := $(CURDIR)/$(VENV):$(PATH):/usr/sbin:/sbin

# What the tools, the tests and the lab need, by its Debian name. The package's own dependencies are in debian/control.
APT_RUN := python3 python3-yaml python3-prctl python3-dbus-next python3-rich dbus polkitd qemu-system-x86
APT_BUILD := dpkg-dev debhelper dh-python go-md2man
APT_TEST := lintian man-db python3-venv ca-certificates git strace procps util-linux swtpm desktop-file-utils
# The shells in which completion is tried.
APT_TEST += bash-completion fish zsh
# virsh, and what it needs to tell QEMU's command line without a daemon (4 MB): `qemu-launcher import --libvirt`.
APT_TEST += libvirt-clients libvirt-daemon-driver-qemu
APT_LAB := mmdebstrap debian-archive-keyring e2fsprogs qemu-utils openssh-client uidmap
# The guest's screen, in a GTK window and through SPICE. They bring Mesa and GTK, so the demo does without them. Debian 13
# has SPICE in a package of its own; Debian 12 in qemu-system-common.
APT_SCREEN := xvfb x11-apps qemu-system-gui spice-client-gtk
APT_SCREEN += $(if $(filter 12,$(shell . /etc/os-release && echo "$$VERSION_ID")),,qemu-system-modules-spice)
# What builds and checks the packages of other distributions: `make rpm`, `make arch`.
APT_OTHERS := rpm rpmlint makepkg pacman-package-manager libarchive-tools shellcheck
# Whoever wants the package alone, `make deb`, gets nothing that only tests and labs need.
APT_PACKAGES := $(APT_BUILD) $(if $(filter-out deb,$(MAKECMDGOALS)),$(APT_RUN) $(APT_TEST) $(APT_LAB)) \
	$(if $(filter setup test test-all,$(MAKECMDGOALS)),$(APT_SCREEN) $(APT_OTHERS))

DEB := build/qemu-launcher_$(VERSION)_all.deb
DEB_SOURCES := $(shell find launcher helper dbus polkit debian -type f -not -path '*/__pycache__/*') \
	Makefile pyproject.toml LICENSE README.md CHANGELOG.md

# Where `make install` puts things. The bus, polkit, systemd, sysusers and udev read fixed folders under /usr: files for
# them go there whatever PREFIX says.
DESTDIR ?=
PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
SBINDIR ?= $(PREFIX)/sbin
LIBEXECDIR ?= $(PREFIX)/libexec
PYTHONDIR ?= $(PREFIX)/lib/qemu-launcher
MANDIR ?= $(PREFIX)/share/man
DOCDIR ?= $(PREFIX)/share/doc/qemu-launcher
# Where shells look for completions below /usr/local; Debian's zsh has another folder for packages (debian/rules).
BASHDIR ?= $(PREFIX)/share/bash-completion/completions
ZSHDIR ?= $(PREFIX)/share/zsh/site-functions
FISHDIR ?= $(PREFIX)/share/fish/vendor_completions.d
UNITDIR := /usr/lib/systemd/system
USERUNITDIR := /usr/lib/systemd/user
SYSUSERSDIR := /usr/lib/sysusers.d
UDEVDIR := /usr/lib/udev/rules.d
DBUSDIR := /usr/share/dbus-1
POLKITDIR := /usr/share/polkit-1

MAN_PAGES := build/man/qemu-launcher.1 build/man/qemu-launcher.yml.5 build/man/qemu-launcher-migration.7 \
	build/man/qemu-launcher-helper.8 build/man/qemu-launcher-helper.toml.5

.PHONY: help setup apt lint unit test test-all test-exhaustive attacks fuzz demo shell deb deb-path dist rpm arch man install uninstall bench clean

help: ## show this list
	@echo "qemu-launcher $(VERSION): make TARGET"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS=$$'\t' read -r t d; do printf '  %-15s %s\n' "$$t" "$$d"; done

# --- set-up -----------------------------------------------------------------------------------------------------------

setup: apt .venv/stamp ## install the Debian packages that are missing, and the Python tools into .venv

apt:
	@have=" $$(dpkg-query -W -f '$${Package}=$${db:Status-Status} ' $(APT_PACKAGES) 2>/dev/null || true) "; missing=; \
	for p in $(APT_PACKAGES); do [[ $$have == *" $$p=installed "* ]] || missing+=" $$p"; done; \
	[ -n "$$missing" ] || exit 0; \
	command -v apt-get >/dev/null || { echo "make setup needs Debian's apt-get; missing:$$missing" >&2; exit 1; }; \
	sudo=; [ "$$(id -u)" = 0 ] || { sudo=sudo; command -v sudo >/dev/null || \
		{ echo "run as root, or install sudo first: apt-get install$$missing" >&2; exit 1; }; }; \
	echo "Installing Debian packages:$$missing"; mkdir -p build; \
	{ $$sudo apt-get -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 update && \
	  $$sudo env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 \
		-o Dpkg::Use-Pty=0 --no-install-recommends install $$missing; } </dev/null >build/apt.log 2>&1 || \
	{ cat build/apt.log >&2; echo "apt-get could not install:$$missing" >&2; exit 1; }

# The development tools are listed once, in pyproject's `dev` extra; pip runs only when that list has changed. A venv holds
# absolute paths and belongs to one Python: it is made anew when the tree has moved or the distribution's Python has.
.venv/stamp: pyproject.toml | apt
	@mark="# $(CURDIR)"; $(VENV)/python -c '' 2>/dev/null && [ "$$(head -n 1 .venv/dev.txt 2>/dev/null)" = "$$mark" ] || \
		{ echo "Making .venv"; rm -rf .venv; $(PYTHON) -m venv --system-site-packages .venv; echo "$$mark" > .venv/dev.txt; }; \
	{ echo "$$mark"; $(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*p["optional-dependencies"]["dev"], sep="\n")'; } > .venv/dev.new; \
	cmp -s .venv/dev.new .venv/dev.txt || { echo "Installing Python tools into .venv"; \
		$(VENV)/python -m pip install --quiet --quiet --disable-pip-version-check --retries 5 -r .venv/dev.new; \
		mv .venv/dev.new .venv/dev.txt; }; \
	rm -f .venv/dev.new; touch $@

# --- tests ------------------------------------------------------------------------------------------------------------

PYTEST := $(VENV)/python -m pytest

lint: setup ## ruff, mypy --strict and the import rules
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	PYTHONPATH=launcher:helper $(VENV)/lint-imports --no-logo

unit: setup ## the tests that take seconds and touch nothing
	$(PYTEST) -q tests/unit tests/contract tests/attacks

attacks: setup deb ## every attack on the helper that was thought of (tests/attacks/README.md)
	$(PYTEST) -m attack tests/unit tests/contract tests/fuzz tests/bus tests/qemu tests/system

# Three labs at once, each of which keeps one CPU busy: system tests go on in two while the others run, and then in three.
TESTS := tests/lint tests/unit tests/contract tests/attacks tests/fuzz tests/package tests/lab tests/bus tests/qemu tests/system

test: setup deb ## every test: lint, unit, contract, packaging, bus, qemu, and the system tests in the lab
	QEMU_LAUNCHER_LAB_SLOTS=$${QEMU_LAUNCHER_LAB_SLOTS:-3} $(PYTEST) --durations=15 $(TESTS)

# `make test` runs the system tests on Debian 13, their core on Debian 12, and what is different with cgroup v1, with
# dbus-broker and without systemd. tests/lab/hosts.py has the list of hosts; QEMU_LAUNCHER_HOSTS=bookworm chooses one.
test-all: setup deb ## the same, with each system test on every host that it is meant for; takes two thirds longer
	QEMU_LAUNCHER_HOSTS=$${QEMU_LAUNCHER_HOSTS:-all} $(MAKE) --no-print-directory test

# `make test` tries, with partitions, all deaths of the helper, and of each other kind some points, the same ones each time;
# QEMU_LAUNCHER_SEED=N tries others. Each mechanism has its points: QEMU_LAUNCHER_HOSTS=trixie is a night without KVM, all
# are days. And a host of 64 CPUs, large VMs of all sizes, and crowds for a hundred rounds.
EXHAUSTIVE := tests/qemu/test_crash_points.py \
	$(addprefix tests/system/test_,crash_points.py crash_deaths.py crash_launcher.py scale.py crowd.py)
test-exhaustive: setup deb ## test-all, then let each step of helper and launcher fail, kill who may die there; crowds; takes days
	env -u QEMU_LAUNCHER_ROUNDS -u QEMU_LAUNCHER_SHARE $(MAKE) --no-print-directory test-all
	QEMU_LAUNCHER_ROUNDS=$${QEMU_LAUNCHER_ROUNDS:-100000} QEMU_LAUNCHER_HOSTS=$${QEMU_LAUNCHER_HOSTS:-all} \
		QEMU_LAUNCHER_LAB_SLOTS=$${QEMU_LAUNCHER_LAB_SLOTS:-3} $(PYTEST) -rP $(EXHAUSTIVE)

# Each target ends at the first thing it finds, and the others still run. helper.toml must belong to root, which a user
# namespace is enough for.
FUZZ_SECONDS ?= 600
fuzz: setup ## feed the helper's parsers odd bytes, FUZZ_SECONDS=600 for each of the three; finds go to build/fuzz
	@found=; for target in message arguments limits; do mkdir -p build/fuzz/$$target; root=; \
		[ "$$(id -u)" = 0 ] || [ $$target != limits ] || root='unshare --map-root-user'; \
		TMPDIR=build/fuzz PYTHONPATH=helper:tests nice $$root $(VENV)/python -m fuzz $$target \
			-max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 -artifact_prefix=build/fuzz/$$target- build/fuzz/$$target tests/fuzz/corpus/$$target || found+=" $$target"; done; \
	[ -z "$$found" ] || { echo "Found something in:$$found. tests/fuzz/test_fuzz.py says what to do with it." >&2; exit 1; }

demo: setup deb ## the main job for real: a VM pinned, shielded, locked and real-time, started by an ordinary user
	PYTHONPATH=tests $(VENV)/python -m demo

shell: setup deb ## a console in the lab, with the package installed
	tests/lab/shell --deb $(DEB)

bench: setup ## what a start costs, as ratios and counts
	$(VENV)/python tests/package/bench.py

# --- the package ------------------------------------------------------------------------------------------------------

deb: $(DEB) ## build the Debian package into build/

deb-path: ## print where `make deb` puts the package
	@echo $(DEB)

# Built in a copy, so that nothing of debhelper's stays in the tree, and with a bare environment, so that the result
# depends on the sources alone. --no-check-builddeps: what is needed is in APT_BUILD; the check would also ask for
# build-essential, a compiler for a package without compiled code. build/qemu-launcher.deb is a stable name for scripts.
$(DEB): $(DEB_SOURCES) | apt
	@echo "Building $@"
	@rm -rf build/deb build/qemu-launcher_*.deb && mkdir -p build/deb/qemu-launcher-$(VERSION)
	@tar -c --exclude=__pycache__ --exclude=.mypy_cache --exclude=.ruff_cache launcher helper dbus polkit debian Makefile pyproject.toml LICENSE \
		README.md CHANGELOG.md | tar -x -C build/deb/qemu-launcher-$(VERSION)
	@cd build/deb/qemu-launcher-$(VERSION) && \
		env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/nonexistent LC_ALL=C.UTF-8 \
		dpkg-buildpackage --build=binary --no-sign --no-check-builddeps >../build.log 2>&1 || { cat ../build.log >&2; exit 1; }
	@mv build/deb/*.deb build/ && rm -rf build/deb/qemu-launcher-$(VERSION)
	@ln -sf $(notdir $@) build/qemu-launcher.deb
	@test -f $@ && touch $@

# What other distributions build from: the same bytes from the same sources, whoever writes it and when.
DIST := build/qemu-launcher-$(VERSION).tar.gz
DATE = $(shell date -ud "$$(sed -n 's/^ -- .*>  //p' debian/changelog | head -n 1)" +%s)

dist: $(DIST) ## write the source archive into build/

$(DIST): $(DEB_SOURCES) $(wildcard packaging/*/* packaging/README.md)
	@mkdir -p build
	@tar -c --sort=name --format=ustar --mtime=@$(DATE) --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
		--exclude=__pycache__ --exclude=.mypy_cache --exclude=.ruff_cache --transform='s|^|qemu-launcher-$(VERSION)/|' \
		launcher helper dbus polkit debian packaging Makefile pyproject.toml LICENSE README.md CHANGELOG.md | gzip -9n > $@

# With nothing of Debian's: these two run on the distribution that they are for. The tests run them here, with RPMBUILD and
# MAKEPKG told to look for no other distribution's packages.
RPMBUILD ?= rpmbuild
MAKEPKG ?= makepkg

rpm: $(DIST) ## build the package for Fedora into build/rpm (packaging/README.md)
	@command -v rpmbuild >/dev/null || { echo 'make rpm needs rpmbuild: dnf install rpm-build' >&2; exit 1; }
	@rm -rf build/rpm && mkdir -p build/rpm/SOURCES && cp $(DIST) build/rpm/SOURCES/
	$(RPMBUILD) -bb --define '_topdir $(CURDIR)/build/rpm' packaging/rpm/qemu-launcher.spec

arch: $(DIST) ## build the package for Arch Linux into build/arch (packaging/README.md)
	@command -v makepkg >/dev/null || { echo 'make arch needs makepkg: pacman -S base-devel' >&2; exit 1; }
	@rm -rf build/arch && mkdir -p build/arch && cp packaging/arch/* $(DIST) build/arch/
	cd build/arch && SOURCE_DATE_EPOCH=$(DATE) $(MAKEPKG)

man: $(MAN_PAGES) ## build the manual pages

build/man/%: launcher/man/%.md
	@mkdir -p $(@D)
	go-md2man -in $< -out $@

build/man/%: helper/man/%.md
	@mkdir -p $(@D)
	go-md2man -in $< -out $@

# --- installation -----------------------------------------------------------------------------------------------------

# Entry scripts, and the files that start one of the two programs, carry paths; everything else is installed as it stands.
place = sed -e 's|^PACKAGES = .*|PACKAGES = "$(PYTHONDIR)"|' -e 's|/usr/libexec/|$(LIBEXECDIR)/|g' \
	-e 's|/usr/bin/qemu-launcher|$(BINDIR)/qemu-launcher|g' $(1) > $(2) && chmod $(3) $(2)

install: $(MAN_PAGES) ## install under DESTDIR and PREFIX (bus, polkit and unit files always below /usr)
	@umask 022; mkdir -p $(addprefix $(DESTDIR),$(BINDIR) $(SBINDIR) $(LIBEXECDIR) $(UNITDIR)/qemu-.slice.d $(USERUNITDIR) $(SYSUSERSDIR) $(UDEVDIR) $(DBUSDIR)/system.d \
		$(DBUSDIR)/system-services $(DBUSDIR)/interfaces $(POLKITDIR)/actions $(POLKITDIR)/rules.d \
		$(addprefix $(MANDIR)/man,1 5 7 8) $(DOCDIR)/examples $(BASHDIR) $(ZSHDIR) $(FISHDIR))
	@$(call place,launcher/qemu-launcher,$(DESTDIR)$(BINDIR)/qemu-launcher,755)
	@$(call place,helper/qemu-launcher-helper,$(DESTDIR)$(LIBEXECDIR)/qemu-launcher-helper,755)
	@install -m 755 helper/qemu-launcher-handover $(DESTDIR)$(LIBEXECDIR)/
	@ln -srf $(DESTDIR)$(LIBEXECDIR)/qemu-launcher-helper $(DESTDIR)$(SBINDIR)/qemu-launcher-helper
	@$(call place,helper/qemu-launcher-helper.service,$(DESTDIR)$(UNITDIR)/qemu-launcher-helper.service,644)
	@$(call place,launcher/qemu-launcher@.service,$(DESTDIR)$(USERUNITDIR)/qemu-launcher@.service,644)
	@$(call place,dbus/org.qemulauncher.Helper1.service,$(DESTDIR)$(DBUSDIR)/system-services/org.qemulauncher.Helper1.service,644)
	@(cd launcher && find qemu_launcher -name '*.py' -o -name py.typed) | while read -r f; do \
		install -D -m 644 launcher/$$f $(DESTDIR)$(PYTHONDIR)/$$f; done
	@(cd helper && find qemu_launcher_helper -name '*.py' -o -name py.typed) | while read -r f; do \
		install -D -m 644 helper/$$f $(DESTDIR)$(PYTHONDIR)/$$f; done
	@install -m 644 helper/qemu-launcher.sysusers.conf $(DESTDIR)$(SYSUSERSDIR)/qemu-launcher.conf
	@install -m 644 helper/qemu-.slice.conf $(DESTDIR)$(UNITDIR)/qemu-.slice.d/10-defaults.conf
	@install -m 644 helper/qemu-launcher.rules $(DESTDIR)$(UDEVDIR)/60-qemu-launcher.rules
	@install -m 644 dbus/org.qemulauncher.Helper1.conf $(DESTDIR)$(DBUSDIR)/system.d/
	@install -m 644 dbus/org.qemulauncher.Helper1.xml $(DESTDIR)$(DBUSDIR)/interfaces/
	@install -m 644 polkit/org.qemulauncher.policy $(DESTDIR)$(POLKITDIR)/actions/
	@install -m 644 polkit/50-qemu-launcher.rules $(DESTDIR)$(POLKITDIR)/rules.d/
	@install -m 644 build/man/*.1 $(DESTDIR)$(MANDIR)/man1/
	@install -m 644 build/man/*.5 $(DESTDIR)$(MANDIR)/man5/
	@install -m 644 build/man/*.7 $(DESTDIR)$(MANDIR)/man7/
	@install -m 644 build/man/*.8 $(DESTDIR)$(MANDIR)/man8/
	@install -m 644 $(addsuffix /examples/*,launcher helper dbus polkit) $(DESTDIR)$(DOCDIR)/examples/
	@install -m 644 launcher/completions/qemu-launcher.bash $(DESTDIR)$(BASHDIR)/qemu-launcher
	@install -m 644 launcher/completions/_qemu-launcher $(DESTDIR)$(ZSHDIR)/
	@install -m 644 launcher/completions/qemu-launcher.fish $(DESTDIR)$(FISHDIR)/
	@[ "$(DOCDIR)" = /usr/share/doc/qemu-launcher ] || sed -i 's|/usr/share/doc/qemu-launcher|$(DOCDIR)|g' \
		$(addprefix $(DESTDIR),$(POLKITDIR)/rules.d/50-qemu-launcher.rules $(PYTHONDIR)/qemu_launcher/check/installation.py \
		$(foreach page,$(notdir $(MAN_PAGES)),$(MANDIR)/man$(subst .,,$(suffix $(page)))/$(page)))
	@[ -n "$(DESTDIR)" ] || { umask 022; $(PYTHON) -m compileall -q $(PYTHONDIR)/qemu_launcher $(PYTHONDIR)/qemu_launcher_helper; \
		if command -v systemd-sysusers >/dev/null; then systemd-sysusers qemu-launcher.conf; \
		else getent group qemu-launcher >/dev/null || groupadd --system qemu-launcher || addgroup -S qemu-launcher; fi; \
		helper/qemu-launcher-handover changed; \
		status=0; $(LIBEXECDIR)/qemu-launcher-helper 2>build/helper.log || status=$$?; [ $$status = 2 ] || \
			{ cat build/helper.log; echo "The helper does not start: dbus-next and python-prctl have to be the distribution's."; } >&2; \
		echo 'Installed. Who may use it: sudo usermod -aG qemu-launcher NAME, then log out and in.'; }

uninstall: ## remove what `make install` with the same variables put there; running VMs keep running
	@[ -n "$(DESTDIR)" ] || helper/qemu-launcher-handover removing
	@rm -rf $(addprefix $(DESTDIR)$(PYTHONDIR)/,qemu_launcher qemu_launcher_helper) $(DESTDIR)$(DOCDIR)/examples
	@rm -f $(DESTDIR)$(BINDIR)/qemu-launcher $(DESTDIR)$(SBINDIR)/qemu-launcher-helper $(DESTDIR)$(LIBEXECDIR)/qemu-launcher-helper \
		$(DESTDIR)$(LIBEXECDIR)/qemu-launcher-handover \
		$(DESTDIR)$(UNITDIR)/qemu-launcher-helper.service $(DESTDIR)$(USERUNITDIR)/qemu-launcher@.service \
		$(DESTDIR)$(UNITDIR)/qemu-.slice.d/10-defaults.conf \
		$(DESTDIR)$(SYSUSERSDIR)/qemu-launcher.conf $(DESTDIR)$(UDEVDIR)/60-qemu-launcher.rules \
		$(DESTDIR)$(DBUSDIR)/system.d/org.qemulauncher.Helper1.conf \
		$(DESTDIR)$(DBUSDIR)/system-services/org.qemulauncher.Helper1.service \
		$(DESTDIR)$(DBUSDIR)/interfaces/org.qemulauncher.Helper1.xml \
		$(DESTDIR)$(POLKITDIR)/actions/org.qemulauncher.policy $(DESTDIR)$(POLKITDIR)/rules.d/50-qemu-launcher.rules \
		$(DESTDIR)$(MANDIR)/man1/qemu-launcher.1 $(DESTDIR)$(MANDIR)/man5/qemu-launcher.yml.5 \
		$(DESTDIR)$(MANDIR)/man7/qemu-launcher-migration.7 \
		$(DESTDIR)$(MANDIR)/man8/qemu-launcher-helper.8 $(DESTDIR)$(MANDIR)/man5/qemu-launcher-helper.toml.5 \
		$(DESTDIR)$(BASHDIR)/qemu-launcher $(DESTDIR)$(ZSHDIR)/_qemu-launcher $(DESTDIR)$(FISHDIR)/qemu-launcher.fish
	@rmdir --ignore-fail-on-non-empty $(wildcard $(DESTDIR)$(DOCDIR) $(DESTDIR)$(PYTHONDIR) $(DESTDIR)$(UNITDIR)/qemu-.slice.d) 2>/dev/null || true
	@[ -n "$(DESTDIR)" ] || helper/qemu-launcher-handover changed

clean: ## remove what was built and cached in the tree (the lab's images stay in QEMU_LAUNCHER_CACHE)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find $(wildcard launcher helper tests) -name __pycache__ -type d -prune -exec rm -rf {} +
