"""One model on several machines: the group they form, what each holds, what they tell each other."""
