# fish completion for qemu-launcher(1). The program itself says what may come next: see COMPLETION there.

function __qemu_launcher_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    for line in ($words[1] __complete $words[2..] "$current" 2>/dev/null)
        switch $line
            case :files
                __fish_complete_path "$current"
            case :users
                __fish_complete_users
            case :commands
                complete -C "$current"
            case '*'
                echo -- $line
        end
    end
end

complete -c qemu-launcher -f -k -a '(__qemu_launcher_complete)'
