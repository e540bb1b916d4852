"""What several commands share: options, inputs, models, stored maps and the terminal."""
