# shellcheck shell=bash disable=SC2034,SC2154
# What the four training scripts share: settings, checks in one process, launch, signals, exit status. Sourced, not run.
#
# A script sets its variables (lower case) and sources this file. Every lower-case variable that a script assigns at the
# start of a line is a setting, `key=value` on the command line overrides it or adds another, and each reaches train.py
# as --key=value, except these, which are about machines and stay here:
#
#   scale=tiny           the same path with a tiny model on a CPU, on the quickstart's corpus
#   n_nodes, node_rank   machines of the run, and which of them this is; n_gpus counts the GPUs of all of them
#   main_address, main_port   where node 0 can be reached (several nodes only)
#
# STATEX_PYTHON=python3 uses that interpreter instead of .venv (a container that has everything).
# Exit status: 0 done, 2 bad input and nothing written, 75 stopped by a signal with everything saved (start the same
# command with resume=auto to go on), 1 anything else. Works with bash 3.2.

LOCAL_KEYS=" scale n_nodes node_rank main_address main_port "
REQUEUE_STATUS=75
n_nodes=1
node_rank=0
main_address=127.0.0.1
main_port=

stop() {
    printf '%s: %s\n' "$SCRIPT" "$*" >&2
    exit 2
}

# key=value, --key=value or --switch -> assigns the variable and remembers its name
# (here and below local names begin with _, so that none can be the name of a setting)
apply_setting() {
    local _text=${1#--} _key _value
    case "$1" in
        *=*) _key=${_text%%=*} _value=${_text#*=} ;;
        --*) _key=$_text _value=true ;;
        *) stop "'$1' is no key=value argument (for example: bash scripts/$SCRIPT drop_prop=4)" ;;
    esac
    _key=${_key//-/_}
    case "$_key" in
        '' | [!a-z]* | *[!a-z0-9_]*) stop "'$1': a key is written in small letters, digits and _" ;;
    esac
    printf -v "$_key" %s "$_value"
    case " $SETTINGS $LOCAL_KEYS " in
        *" $_key "*) ;;
        *) SETTINGS="$SETTINGS $_key" ;;
    esac
}

# is_named KEY ARGUMENT...: whether one of the arguments sets KEY
is_named() {
    local _key=$1 _argument
    shift
    for _argument in "$@"; do
        _argument=${_argument#--} _argument=${_argument%%=*}
        if [ "${_argument//-/_}" = "$_key" ]; then return 0; fi
    done
    return 1
}

# a leading 0 would make it octal
is_count() {
    case "$1" in '' | *[!0-9]* | 0*) return 1 ;; esac
}

find_python() {
    PYTHON=${STATEX_PYTHON:-.venv/bin/python}
    if [ -z "${STATEX_PYTHON:-}" ] && [ ! -x "$PYTHON" ]; then bash scripts/setup.sh || exit; fi
}

# Real text with associative recall mixed in, from this Python's own library; made once, some 20 s.
CORPUS=output/quickstart/data
make_corpus() {
    [ -e "$CORPUS/quickstart.json" ] || echo "$SCRIPT: making a corpus in $CORPUS" >&2
    "$PYTHON" -m data.quickstart out="$CORPUS" text_share=0.2 recall_share=0.85 recall_pairs=4,4,8,16 recall_queries=30 \
        recall_keys=16 recall_values=8 vocabulary_size=512 >&2 || exit
}

# The same recipe, small enough for a CPU: a tiny model from random weights on the quickstart's corpus.
apply_tiny() {
    apply_setting model_name="${model_name%%-*}-tiny"
    apply_setting train_config=configs/training/tiny.json
    apply_setting init_from=scratch
    apply_setting ckpt_path=
    apply_setting launch=cpu
    apply_setting n_gpus=1
    if [ -n "${drop_prop:-}" ]; then apply_setting drop_prop=2; fi # the tiny models have 4 layers
    apply_setting data_path="$CORPUS/train"
    if ! is_named data_path "$@"; then apply_setting validation_data_path="$CORPUS/validation"; fi
    apply_setting tokenizer="$CORPUS/tokenizer"
}

# Made only once the arguments are known to be good; what cannot be checked without it is checked afterwards.
make_tiny_corpus() {
    case " ${data_path:-} ${validation_data_path:-} ${tokenizer:-} " in
        *" $CORPUS/"*) ;;
        *) return ;;
    esac
    [ -e "$CORPUS/quickstart.json" ] || "$PYTHON" train.py "${ARGUMENTS[@]}" --plan=true >/dev/null || exit
    make_corpus
}

apply_command_line() {
    local _argument
    scale=
    for _argument in "$@"; do
        case "${_argument#--}" in scale=*) scale=${_argument#*=} ;; esac
    done
    case "$scale" in
        '') ;;
        tiny) apply_tiny "$@" ;;
        *) stop "scale=$scale: the only scale is tiny; leave it out for the full recipe" ;;
    esac
    for _argument in "$@"; do apply_setting "$_argument"; done
    # one of the two says where the weights come from; what the command line names wins over the script's default
    if is_named ckpt_path "$@"; then
        if ! is_named init_from "$@"; then init_from=pretrained; fi
    elif [ "$init_from" = scratch ]; then
        ckpt_path=
    fi
}

# settings -> ARGUMENTS of train.py; an empty value leaves a key at its default
collect_arguments() {
    local _key
    ARGUMENTS=()
    for _key in $SETTINGS; do
        if [ -n "${!_key}" ]; then ARGUMENTS[${#ARGUMENTS[@]}]="--$_key=${!_key}"; fi
    done
}

is_on() {
    case "$1" in true | True | TRUE | 1) return 0 ;; *) return 1 ;; esac
}

# Where the run writes. Wrong keys, types and ranges show here already, before torch is imported.
find_run_dir() {
    RUN_DIR=$("$PYTHON" -c "$PRINT_RUN_DIR" "$SETTINGS" "${ARGUMENTS[@]}") || exit
}
PRINT_RUN_DIR='
import sys
from training.config import ConfigError, parse_arguments, require_known
try:
    for key in sys.argv[1].split():  # those without a value too
        require_known(key)
    print(parse_arguments(sys.argv[2:]).run_dir)
except ConfigError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)'

check_counts() {
    is_count "$n_nodes" || stop "n_nodes=$n_nodes: a number of machines, 1 or more"
    is_count "$n_gpus" || stop "n_gpus=$n_gpus: a number of GPUs, 1 or more"
    case "$node_rank" in '' | *[!0-9]* | 0?*) stop "node_rank=$node_rank: 0 to $((n_nodes - 1))" ;; esac
    [ "$node_rank" -lt "$n_nodes" ] || stop "node_rank=$node_rank: 0 to $((n_nodes - 1)), n_nodes is $n_nodes"
    [ $((n_gpus % n_nodes)) -eq 0 ] ||
        stop "n_gpus=$n_gpus: counts the GPUs of all $n_nodes nodes, so it is a multiple of $n_nodes"
    case "$main_port" in
        '' | 0) ;;
        *) is_count "$main_port" && [ "$main_port" -le 65535 ] || stop "main_port=$main_port: a port number, 1 to 65535" ;;
    esac
    local cores
    # a rehearsal of a launch on many GPUs (docs/training.md) may crowd its processes on few cores
    if [ "$launch" = cpu ] && [ "${STATEX_CPU_REHEARSAL:-}" != 1 ]; then
        cores=$("$PYTHON" -c 'import os; print(os.cpu_count())')
        [ $((n_gpus / n_nodes)) -le "$cores" ] ||
            stop "n_gpus=$n_gpus: with launch=cpu it is the number of processes, and this machine has $cores cores"
    fi
}

# DeepSpeed makes its group of one by itself (training/distribution.py).
needs_launcher() {
    [ "$n_gpus" -gt 1 ] || [ "$launch" = ddp ]
}

# Checks every argument in one process, because launchers turn any exit status into 1 and print a traceback.
# Without a launcher train.py itself answers status 2 and one line, before it writes anything: seconds saved.
check_settings() {
    needs_launcher || return 0
    LOCAL_WORLD_SIZE=$((n_gpus / n_nodes)) "$PYTHON" train.py "${ARGUMENTS[@]}" --validate_only=true || exit
}

# settings -> COMMAND
build_command() {
    COMMAND=("$PYTHON")
    if needs_launcher; then
        if [ -z "$main_port" ]; then
            # port 0: any free one, so that two runs on one machine do not meet
            if [ "$n_nodes" -gt 1 ]; then main_port=29500; else main_port=0; fi
        fi
        # what torch's launcher sets for several processes on GPUs anyway, with four lines of warning
        if [ "$launch" != cpu ] && [ "$n_gpus" -gt "$n_nodes" ]; then export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; fi
        COMMAND=("$PYTHON" -m accelerate.commands.launch --config_file "configs/launch/$launch.yaml"
            --num_processes "$n_gpus" --num_machines "$n_nodes" --machine_rank "$node_rank"
            --main_process_ip "$main_address" --main_process_port "$main_port")
    fi
    COMMAND=("${COMMAND[@]}" train.py "${ARGUMENTS[@]}")
}

# The processes that train: the launcher's children that run train.py, or the launcher itself where there is one process.
# Launchers are passed over: they would end the ranks before a checkpoint is written. -ww: ps cuts lines at COLUMNS.
training_processes() {
    ps -A -ww -o pid= -o ppid= -o args= | awk -v launcher="$LAUNCHER" '
        !/train\.py/ { next }
        /accelerate[.]commands[.]launch/ { next }
        $1 == launcher || $2 == launcher { print $1 }'
}

forward_signal() {
    INTERRUPTED=yes
    local process
    for process in $(training_processes); do kill -s "$1" "$process" 2>/dev/null; done
}

interrupt() {
    INTERRUPTED=yes
    if [ -n "${ASKED_TO_STOP:-}" ]; then
        kill -s KILL -- "-$LAUNCHER" 2>/dev/null
        return
    fi
    ASKED_TO_STOP=yes
    echo "$SCRIPT: saving a checkpoint and stopping; Ctrl-C again stops at once" >&2
    forward_signal TERM
}

# Runs COMMAND in a process group of its own, hands signals on to the ranks, sets STATUS.
run_command() {
    set -m
    # a launcher that does not know SIGUSR1 would die of it; train.py installs its own handler
    (trap '' USR1 && exec "${COMMAND[@]}") </dev/null &
    LAUNCHER=$!
    set +m
    trap 'forward_signal TERM' TERM
    trap 'forward_signal USR1' USR1
    trap interrupt INT
    STATUS=127
    local answer
    while :; do
        INTERRUPTED=no
        wait "$LAUNCHER"
        answer=$?
        # 127: already waited for, a signal came in between
        if [ "$answer" -ne 127 ]; then STATUS=$answer; fi
        if [ "$INTERRUPTED" = no ]; then break; fi
    done
    trap - TERM USR1 INT
}

start_training() {
    SCRIPT=$(basename "$0")
    case " $* " in
        *" --help "* | *" -h "*) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0" && exit 0 ;;
    esac
    SETTINGS=$(sed -n 's/^\([a-z][a-z0-9_]*\)=.*/\1/p' "$0" | tr '\n' ' ')
    cd "$(dirname "$0")/.." || exit 1
    find_python
    apply_command_line "$@"
    collect_arguments
    if ! is_on "${plan:-}"; then check_counts; fi
    find_run_dir
    if is_on "${plan:-}"; then exec "$PYTHON" train.py "${ARGUMENTS[@]}"; fi

    if [ "$scale" = tiny ]; then make_tiny_corpus; fi
    check_settings
    build_command
    rm -f "$RUN_DIR/requeue"
    printf '%s:' "$SCRIPT"
    printf ' %q' "${COMMAND[@]}"
    printf '\n'
    run_command
    if [ -e "$RUN_DIR/requeue" ]; then exit "$REQUEUE_STATUS"; fi
    if [ "$STATUS" -ne 0 ] && [ "$STATUS" -ne 2 ]; then exit 1; fi
    exit "$STATUS"
}
