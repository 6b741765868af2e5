# bash completion for qemu-launcher(1). The program itself says what may come next: see COMPLETION there.

_qemu_launcher() {
    local word directive=
    COMPREPLY=()
    while IFS=$'\t' read -r word _; do
        case $word in
            :*) directive=$word ;;
            *) COMPREPLY+=("$word") ;;
        esac
    done < <("${1/#\~\//$HOME/}" __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
    case $directive in
        :files) compopt -o default ;; # readline's own, which knows about tildes and quotes
        :users) mapfile -t COMPREPLY < <(compgen -u -- "$2") ;;
        :commands) mapfile -t COMPREPLY < <(compgen -c -- "$2") ;;
    esac
}
complete -F _qemu_launcher qemu-launcher
