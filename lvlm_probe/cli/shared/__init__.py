"""Parts of commands: options, inputs, models, answers, maps, studies and the terminal."""
