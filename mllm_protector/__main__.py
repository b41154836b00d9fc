"""``python -m mllm_protector COMMAND``, also for launchers: ``torchrun -m mllm_protector train-detector``."""

from mllm_protector.commands import main

if __name__ == "__main__":
    main()
