"""What the real guest and the tiny guest carry. A change here, or in the builder, makes a new image."""

# On top of debootstrap's minimum. Without dbus and libpam-systemd the guest ignores the power button.
PACKAGES = (
    "systemd-sysv",
    "dbus",
    "libpam-systemd",
    "kmod",
    "udev",
    "netbase",
    "iproute2",
    "openssh-server",
    "qemu-guest-agent",
)

# Copies of the image are made all the time: what no guest here reads does not go in.
UNWANTED = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/cache/debconf",
)

ENABLED = (
    "ssh-host-keys.service",
    "serial-getty@ttyS0.service",
    "qemu-guest-agent.service",
    "systemd-networkd.service",
)
# Work that a guest of some minutes does not need, each a second or so without hardware virtualisation, and questions
# on the console that nobody answers.
MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "modprobe@configfs.service",
    "modprobe@dm_mod.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "modprobe@loop.service",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-firstboot.service",
    "systemd-networkd-wait-online.service",
    "systemd-pstore.service",
    "user@.service",
)

FSTAB = """\
LABEL=root  /      ext4  defaults  0 1
LABEL=DATA  /data  ext4  nofail,x-systemd.device-timeout=30s  0 0
"""

# Cloud images make their own host keys on the first boot. So does a guest that was sysprepped. Logins wait for it, so
# that the console can tell the new key.
SSH_HOST_KEYS = """\
[Unit]
Description=SSH host keys, when they are missing
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key
Before=ssh.service systemd-user-sessions.service

[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -A

[Install]
WantedBy=multi-user.target
"""

AUTOLOGIN = """\
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200 %I vt220
"""

NETWORK = """\
[Match]
Name=en* eth*

[Network]
DHCP=yes
"""

# Hardware that a guest has or fakes, and that costs seconds to bring up without hardware virtualisation.
NOT_LOADED = """\
blacklist ata_piix
blacklist floppy
blacklist kvm_amd
blacklist kvm_intel
blacklist pcspkr
blacklist powernow_k8
"""

# Said on the console at login, so that a console log tells two guests apart.
IDENTITY = """\
echo "identity hostname $(hostname)"
echo "identity machine-id $(cat /etc/machine-id)"
echo "identity host-key $(ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub | cut -d' ' -f2)"
echo "identity old-logs $(ls /var/log/planted-*.log 2>/dev/null | wc -l)"
"""

FILES = {
    "etc/fstab": FSTAB,
    "etc/hostname": "planted-guest\n",
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 planted-guest\n",
    "etc/systemd/system/ssh-host-keys.service": SSH_HOST_KEYS,
    "etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf": AUTOLOGIN,
    "etc/systemd/network/dhcp.network": NETWORK,
    "etc/modprobe.d/not-loaded.conf": NOT_LOADED,
    "etc/profile.d/identity.sh": IDENTITY,
    # What a guest gathers in its life and a template must not hand on: virt-sysprep has to remove all of these, and
    # the machine id and host keys that the builder adds.
    "etc/udev/rules.d/70-persistent-net.rules": (
        'SUBSYSTEM=="net", ACTION=="add", ATTR{address}=="52:54:00:00:00:01", NAME="eth0"\n'
    ),
    "root/.bash_history": "echo a secret of the first life\n",
    "root/.ssh/authorized_keys": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPlantedPlantedPlantedPlantedPlant planted\n",
    "tmp/planted": "left behind\n",
    "var/log/auth.log": "a login of the first life\n",
    "var/log/planted-one.log": "a line of the first life\n",
    "var/log/planted-two.log": "another line of the first life\n",
    "var/mail/root": "From planted\n",
}
DIRECTORIES = {"data": 0o755, "root/.ssh": 0o700}

# The file on the second disk.
DATA_FILES = {"planted.txt": "data of the second disk\n"}

# What the initial ramdisk loads, each with what it depends on, in this order. A kernel may have some built in.
MODULES = (
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "sd_mod",
    "crc32c_generic",
    "ext4",
    "button",
    "evdev",
)

TINY_GREETING = "tiny guest is up"

# The first process of both guests. With root= on the kernel's command line it goes on to that file system; without,
# it is the whole guest.
INIT = f"""\
#!/bin/sh
export PATH=/bin
mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/console 2>&1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
while read -r module; do insmod "/modules/$module"; done </modules/order

root=
for word in $(cat /proc/cmdline); do
    case $word in root=*) root=${{word#root=}} ;; esac
done

tiny() {{
    for device in /sys/class/input/event*; do
        if [ "$(cat "$device/device/name")" = "Power Button" ]; then
            # Opened here, so that nothing pressed after the greeting is lost. Events are read whole or not at all.
            exec 3<"/dev/input/${{device##*/}}"
            (dd of=/dev/null bs=24 count=1 <&3 2>/dev/null && poweroff -f) &
        fi
    done
    echo "{TINY_GREETING}"
    while :; do sleep 3600; done
}}

find_root() {{
    case $root in
        LABEL=*|UUID=*) device=$(findfs "$root" 2>/dev/null) ;;
        *) device=$root ;;
    esac
    [ -b "$device" ]
}}

[ -n "$root" ] || tiny
tries=0
until find_root; do
    tries=$((tries + 1))
    if [ "$tries" -gt 300 ]; then
        echo "init: there is no $root"
        poweroff -f
    fi
    sleep 0.1
done
mount -t ext4 "$device" /root || poweroff -f
umount /proc /sys
mount -o move /dev /root/dev 2>/dev/null || umount -l /dev
exec switch_root /root /sbin/init
"""
