#!/bin/sh
# Lets launchd keep the supervisor alive.
#   deploy/install-launchd.sh             for you, from login on (LaunchAgent)
#   sudo deploy/install-launchd.sh --daemon    from boot on, without a login, running as you (LaunchDaemon)
#   … --print                             only print the filled plist
# LMX_HOME (default ~/.lmx) and LMX_PYTHON (default: this checkout's .venv) may be set.
set -eu

label=com.lmx.supervisor
here=$(cd "$(dirname "$0")" && pwd -P)
daemon=no print=no
for option; do
  case $option in
    --daemon) daemon=yes ;;
    --print) print=yes ;;
    *)
      echo "usage: $0 [--daemon] [--print]" >&2
      exit 2
      ;;
  esac
done

user=$(id -un) home=$HOME
if [ "$daemon" = yes ] && [ -n "${SUDO_USER:-}" ]; then
  user=$SUDO_USER
  home=$(eval "echo ~$user")
fi
python=${LMX_PYTHON:-$(dirname "$here")/.venv/bin/python}
lmx_home=${LMX_HOME:-$home/.lmx}
log_dir=$lmx_home/logs
[ "$daemon" = no ] || log_dir=/var/log/lmx

quoted() { # for XML, then for the right side of sed's s|||
  printf '%s' "$1" | sed -e 's/&/\&amp;/g' -e 's/</\&lt;/g' -e 's/>/\&gt;/g' -e 's/[\\&|]/\\&/g'
}
filled() {
  sed -e "s|@PYTHON@|$(quoted "$python")|" -e "s|@LMX_HOME@|$(quoted "$lmx_home")|" \
    -e "s|@HOME@|$(quoted "$home")|" -e "s|@USER@|$(quoted "$user")|" \
    -e "s|@LOG_DIR@|$(quoted "$log_dir")|" -e '/A template:/d' "$here/$label.plist"
}
if [ "$print" = yes ]; then
  filled
  exit 0
fi

fail() {
  echo "install-launchd: $*" >&2
  exit 1
}
[ "$(uname -s)" = Darwin ] || fail "launchd is part of macOS; this is $(uname -s)."
[ -x "$python" ] || fail "$python does not exist: run 'make setup' first."
if [ "$daemon" = yes ]; then
  [ "$(id -u)" = 0 ] || fail "--daemon needs root: sudo $0 --daemon"
  domain=system folder=/Library/LaunchDaemons
else
  [ "$(id -u)" != 0 ] || fail "an agent belongs to a user: run it without sudo, or with --daemon."
  domain=gui/$(id -u) folder=$home/Library/LaunchAgents
  launchctl print "$domain" >/dev/null 2>&1 ||
    fail "you are not logged in at the screen, so there is no $domain. Without logins use: sudo $0 --daemon"
fi

# launchd fails without a word when a folder is missing.
mkdir -p "$folder" "$lmx_home" "$log_dir"
chmod 700 "$lmx_home"
[ "$daemon" = no ] || chown "$user" "$lmx_home" "$log_dir"
plist=$folder/$label.plist
filled >"$plist.new"
if command -v plutil >/dev/null; then plutil -lint "$plist.new" >/dev/null || fail "plutil refused $plist.new"; fi
chmod 644 "$plist.new"
mv "$plist.new" "$plist"

loaded() { launchctl print "$domain/$label" >/dev/null 2>&1; }
if loaded; then
  echo "stopping the running job (up to 60 s) …"
  launchctl bootout "$domain/$label" || true
  left=75
  while loaded && [ $left -gt 0 ]; do
    sleep 1
    left=$((left - 1))
  done
fi
launchctl enable "$domain/$label"

# For some seconds after a bootout, bootstrap fails with 5, 37 or 113.
left=15
while :; do
  status=0
  launchctl bootstrap "$domain" "$plist" || status=$?
  case $status in
    0) break ;;
    5 | 37 | 113) [ $left -gt 0 ] || fail "launchctl bootstrap still fails with $status after 15 s." ;;
    *) fail "launchctl bootstrap failed with $status." ;;
  esac
  sleep 1
  left=$((left - 1))
done

echo "installed $plist
  look at it   launchctl print $domain/$label
  its output   $log_dir/launchd.err.log
  stop it      launchctl bootout $domain/$label"
