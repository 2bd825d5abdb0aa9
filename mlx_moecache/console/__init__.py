"""What the commands share: flags, prompts, reports, terminals."""
