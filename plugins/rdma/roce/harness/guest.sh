# Runs as the guest's first program: networks, soft-RoCE, then the job; its status goes to the host.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
. /run/out/environ
mount -t tmpfs tmp /var/tmp
export TMPDIR=/var/tmp
stty -F /dev/ttyS1 raw -echo 115200
ip link set lo up
ip link add dummy0 type dummy 2>/dev/null
device=${ROCE_DEVICE:-dummy0}
ip link set "$device" mtu 4400
for address in $ROCE_ADDRESSES; do
  case $address in *:*) flag=nodad ;; *) flag= ;; esac
  ip addr add "$address" dev "$device" $flag
done
ip link set "$device" up
rdma link add rxe0 type rxe netdev "$device"
echo "guest: up after $(cut -d' ' -f1 /proc/uptime) s"
bash /run/out/job.sh >/run/out/job.log 2>&1
echo $? >/run/out/status
sync
echo o >/proc/sysrq-trigger
sleep 60
