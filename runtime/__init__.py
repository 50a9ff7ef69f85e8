"""What keeps a run alive: settings, files, processes, checkpoints, logs, errors.

A reader of the paper needs only `schedule` and `Ranks.sum_gradients`. The package deals in files,
tensors, processes and numbers, and imports neither the network nor a stage:

    errors      a user's mistakes, and how a command ends with one
    settings    one dataclass per stage -> command line, bounds, JSON
    files       writing that survives a crash; hashes
    hub         a model's name -> a local folder
    formats     a Llama's config.json and safetensors: read and checked
    encoders    PEFT adapters, encoder folders, exported folders: the same
    identity    what a model is: hashes of its tensors, architecture and tokenizer
    devices     device, dtype, and asynchronous copies
    cpu         what makes PyTorch fast on a CPU
    cuda        attention of packed sequences in one call
    ranks       the processes of a job and what they exchange
    schedule    learning rate, order and randomness as functions of seed and step
    checkpoints weights and optimiser state, sealed by hashes
    run         a run's folder: lock, resume, log, signals, the end
    results     the JSON files of evaluate.py, averages and comparisons
"""
