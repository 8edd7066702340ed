#!/bin/bash
# core_is_pure_test.sh DRIVER_LIBRARY LIBRARY...: what decides asks for no time, starts and waits for no thread, draws
# nothing and calls nobody by itself; that is what World is for. Looks at the symbols that the objects need from others.
# DRIVER_LIBRARY does such things: what is looked for has to be found there.
set -euo pipefail
impure='absl::[a-z0-9_:]*(Now|SleepFor|Mutex|CondVar|Notification|BitGen)\b|\bgrpc::|pthread_|clock_gettime'
impure+='|std::(thread|this_thread|mutex|random_device|chrono)\b|gettimeofday|\bgetenv|\bfopen|std::basic_[io]fstream'
readonly impure
needs() { nm -C --undefined-only "$@" | grep -E "$impure" | sort -u || true; }
libraries=()
for file in "$@"; do
  [[ $file != *.a ]] || libraries+=("$file")
done
if ((${#libraries[@]} < 5)); then
  echo "only ${#libraries[@]} libraries are looked at"
  exit 1
fi
readonly driver=${libraries[0]}
if [[ -z $(needs "$driver") ]]; then
  echo "nothing is found in $driver, which has threads: the test is blind"
  exit 1
fi
for library in "${libraries[@]:1}"; do
  found=$(needs "$library")
  [[ -z $found ]] && continue
  echo "$library needs"
  echo "$found"
  exit 1
done
