"""What commands are made of: options, inputs, models, answers, maps, studies and the terminal."""
