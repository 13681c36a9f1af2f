#!/usr/bin/env bash
# Runs test programs on an emulated CPU with AMX: boots Linux in Bochs with the programs in its initial file system.
#   BOCHS=~/bochs/bochs KERNEL=~/vmlinuz tests/amx/run.sh COMMAND FILE...
# COMMAND is run in /work of that system, which holds each FILE under its own name and tests/golden as the repository
# does. Prints what it says, and fails where it does not end with success. README.md has the rest.
set -euo pipefail
: "${BOCHS:?the program, in its source folder}" "${KERNEL:?a Linux kernel for x86-64, 5.16 or newer}"
command=${1:?a command}
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
files=$work/root
mkdir -p "$files"/{bin,proc,dev,tmp,work,lib64,lib/x86_64-linux-gnu} "$files$root/tests" "$work/disk"

# The system: busybox, what a Rust program loads, the programs, the fixtures.
cp "$(command -v busybox)" "$files/bin/busybox"
for tool in sh mount grep sleep poweroff; do ln -s busybox "$files/bin/$tool"; done
cp -L /lib64/ld-linux-x86-64.so.2 "$files/lib64/"
for library in libc.so.6 libm.so.6 libgcc_s.so.1; do
  cp -L "/lib/x86_64-linux-gnu/$library" "$files/lib/x86_64-linux-gnu/"
done
if [ $# -gt 0 ]; then cp "$@" "$files/work/"; fi
cp -r "$root/tests/golden" "$files$root/tests/golden"
ln -s "$root/tests" "$files/work/tests"
cat > "$files/init" <<EOF
#!/bin/sh
mount -t proc proc /proc
mount -t devtmpfs dev /dev
cd /work
echo "-- begin"
grep -o -m 1 amx_bf16 /proc/cpuinfo || echo "no amx_bf16"
$command
echo "-- end \$?"
sleep 2
poweroff -f
EOF
chmod +x "$files/init"
(cd "$files" && find . | cpio -o -H newc 2> /dev/null | gzip -1) > "$work/disk/initrd"

# A disk that boots it. Bochs has no fast-string MSR, so Linux drops ERMS and keeps FSRM, and its memmove needs both.
cp "$KERNEL" "$work/disk/linux"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$work/disk/"
cat > "$work/disk/isolinux.cfg" <<EOF
DEFAULT linux
LABEL linux
 KERNEL /linux
 INITRD /initrd
 APPEND console=ttyS0 quiet nokaslr mitigations=off rdinit=/init clearcpuid=fsrm lsm=none
EOF
xorriso -as mkisofs -quiet -o "$work/boot.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
  -boot-info-table "$work/disk" 2> /dev/null

bios=$(dirname "$BOCHS")/bios
cat > "$work/bochsrc" <<EOF
megs: 2048
cpu: model=sapphire_rapids, count=1, ips=60000000, ignore_bad_msrs=1
romimage: file=$bios/BIOS-bochs-latest
vgaromimage: file=$bios/VGABIOS-lgpl/VGABIOS-lgpl-latest.bin
ata0-master: type=cdrom, path=$work/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial
display_library: nogui
log: $work/log
panic: action=fatal
clock: sync=none
EOF
# It ends in a panic of its own: the power is off.
"$BOCHS" -q -f "$work/bochsrc" > "$work/out" 2>&1 || true
tr -d '\r' < "$work/serial" | sed -n '/^-- begin/,$p'
grep -q '^-- end 0' "$work/serial"
