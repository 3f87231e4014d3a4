// What the page "How it works" says and draws of each variant. A picture is boxes and flows, revealed step by step.
//
// boxes: name: [kind, column, line, text, width in columns]; flows: [from, to, step]; a box appears with the first flow into it.
// steps: one sentence each, in order; the flows and boxes of a step are marked while it is shown.

const trunk = { trunk: ["target", 1, 2, "model: all layers", 1.6], root: ["token", 0, 2, "fox"] };
const verified = (first) => [
  `One pass of the model reads the root and all guesses at once: it costs little more than one token, since every weight is read anyway.`,
  `Guesses that are what the model itself decides are kept, up to the first wrong one; the model's own token follows. Nothing else is ever written.`,
].map((text, index) => ({ text, step: first + index }));

const passBoxes = (column) => ({
  check: ["target", column, 2, "one pass checks all", 1.5],
  kept: ["token good", column + 2, 1.2, "jumped over"],
  own: ["token good", column + 2, 2.2, "the"],
  wrong: ["token wrong", column + 2, 3.2, "dog"],
});

export const VARIANTS = [
  {
    name: "plain", title: "Plain decoding",
    summary: "Each token needs a pass over all weights. The pass takes as long as reading them from memory, and gives one token.",
    properties: { "Trained": "nothing", "Passes per token": "1", "Text": "the reference for all others" },
    boxes: { ...trunk, lm: ["target", 3, 2, "LM head"], one: ["token good", 4.2, 2, "jumped"], again: ["token", 4.2, 3.3, "and again"] },
    flows: [["root", "trunk", 1], ["trunk", "lm", 2], ["lm", "one", 3], ["one", "again", 4]],
    steps: [
      "The last token goes through every layer of the model.",
      "The LM head turns the last hidden state into a score for each token of the vocabulary.",
      "One token is decided.",
      "It is the input of the next pass. A text of a hundred tokens reads every weight a hundred times.",
    ],
  },
  {
    name: "model", title: "Draft model", paper: "Leviathan et al. 2023, Chen et al. 2023",
    summary: "A smaller model of the same vocabulary writes a few tokens ahead; the large one checks them in one pass.",
    properties: { "Trained": "a separate small model", "Reads": "the text only", "Guesses": "one pass of the small model each" },
    boxes: {
      root: ["token", 0, 2, "fox"], small: ["drafter", 1, 2, "small model", 1.3],
      one: ["token", 2.7, 1, "jumped"], two: ["token", 2.7, 2, "over"], three: ["token", 2.7, 3, "dog"], ...passBoxes(4),
    },
    flows: [["root", "small", 1], ["small", "one", 1], ["one", "two", 2], ["two", "three", 2], ["one", "check", 3], ["two", "check", 3],
      ["three", "check", 3], ["check", "kept", 4], ["check", "own", 4], ["check", "wrong", 4]],
    steps: ["The small model reads the root and guesses the next token.", "It goes on from its own guesses, one pass each.", ...verified(3).map((s) => s.text)],
  },
  {
    name: "lookup", title: "Lookup", paper: "prompt lookup, Saxena 2023; suffix automaton",
    summary: "Texts repeat themselves. Where the last words have occurred before, what followed them then is the guess. Nothing is trained.",
    properties: { "Trained": "nothing", "Reads": "the text only", "Best at": "edits, summaries, code, quotations" },
    boxes: {
      text: ["token", 0, 0.8, "… the fox jumped over the log …", 2.7], root: ["token", 0, 2.6, "… the fox", 1.3],
      match: ["drafter", 1.9, 1.8, "the longest match", 1.4], one: ["token", 3.6, 1.1, "jumped"], two: ["token", 3.6, 2, "over"],
      ...passBoxes(4.9),
    },
    flows: [["root", "match", 1], ["text", "match", 1], ["match", "one", 2], ["match", "two", 2], ["one", "check", 3], ["two", "check", 3],
      ["check", "kept", 4], ["check", "own", 4], ["check", "wrong", 4]],
    steps: ["The end of the text is looked up in the text before it.", "What followed there is the guess.", ...verified(3).map((s) => s.text)],
  },
  {
    name: "medusa", title: "Medusa", paper: "Cai et al. 2024",
    summary: "Extra heads beside the LM head: the second guesses the token after the next, the third the one after that, all from the same hidden state.",
    properties: { "Trained": "a few layers per head, the model stays as it is", "Reads": "the last hidden state", "Guesses": "all depths at once" },
    boxes: {
      ...trunk, state: ["target", 3, 2, "hidden state"], h1: ["drafter", 4.3, 0.8, "head 1"], h2: ["drafter", 4.3, 2, "head 2"], h3: ["drafter", 4.3, 3.2, "head 3"],
      one: ["token", 5.5, 0.8, "jumped, ran"], two: ["token", 5.5, 2, "over, to"], three: ["token", 5.5, 3.2, "a, the"], tree: ["drafter", 6.7, 2, "tree"], ...passBoxes(7.8),
    },
    flows: [["root", "trunk", 1], ["trunk", "state", 1], ["state", "h1", 2], ["state", "h2", 2], ["state", "h3", 2], ["h1", "one", 2], ["h2", "two", 2],
      ["h3", "three", 2], ["one", "tree", 3], ["two", "tree", 3], ["three", "tree", 3], ["tree", "check", 4], ["check", "kept", 5], ["check", "own", 5], ["check", "wrong", 5]],
    steps: ["The pass that decided the last token left a hidden state.", "Every head guesses its own position from it, at the same time and without knowing the other guesses.",
      "The best guesses of each depth are combined to a tree.", ...verified(4).map((s) => s.text)],
  },
  {
    name: "hydra", title: "Hydra", paper: "Ankner et al. 2024",
    summary: "Medusa's heads, but each also reads the tokens guessed before it, so that a path of guesses fits together.",
    properties: { "Trained": "a few layers per head", "Reads": "hidden state, and the embeddings of the guesses before", "Guesses": "one level after the other" },
    boxes: {
      ...trunk, state: ["target", 3, 2, "hidden state"], h1: ["drafter", 4.3, 0.8, "head 1"], one: ["token", 5.4, 0.8, "jumped"], h2: ["drafter", 5.4, 2, "head 2"],
      two: ["token", 6.5, 2, "over"], h3: ["drafter", 6.5, 3.2, "head 3"], three: ["token", 7.6, 3.2, "the"], ...passBoxes(8.8),
    },
    flows: [["root", "trunk", 1], ["trunk", "state", 1], ["state", "h1", 2], ["h1", "one", 2], ["state", "h2", 3], ["one", "h2", 3], ["h2", "two", 3], ["state", "h3", 4],
      ["two", "h3", 4], ["h3", "three", 4], ["one", "check", 5], ["two", "check", 5], ["three", "check", 5], ["check", "kept", 6], ["check", "own", 6], ["check", "wrong", 6]],
    steps: ["The pass that decided the last token left a hidden state.", "The first head guesses the next token from it.", "The second head reads the state and the first guess.",
      "The third reads the state and both guesses.", ...verified(5).map((s) => s.text)],
  },
  {
    name: "eagle", title: "EAGLE", paper: "Li et al. 2024, two papers",
    summary: "One decoder layer continues the model's own hidden states: it reads the state of a token and the token after it, and predicts the next state.",
    properties: { "Trained": "one decoder layer", "Reads": "the last hidden states of the whole text", "Guesses": "with the model's own LM head" },
    boxes: {
      ...trunk, state: ["target", 3, 1.2, "hidden state"], token: ["token", 3, 2.8, "next token"], layer: ["drafter", 4.3, 2, "one layer"], predicted: ["drafter", 5.6, 1.2, "next state"],
      one: ["token", 5.6, 2.8, "jumped, ran"], again: ["drafter", 6.9, 2, "layer again"], two: ["token", 8.1, 2, "over, to"], ...passBoxes(9.3),
    },
    flows: [["root", "trunk", 1], ["trunk", "state", 1], ["trunk", "token", 1], ["state", "layer", 2], ["token", "layer", 2], ["layer", "predicted", 2], ["layer", "one", 2],
      ["predicted", "again", 3], ["one", "again", 3], ["again", "two", 3], ["two", "check", 4], ["check", "kept", 5], ["check", "own", 5], ["check", "wrong", 5]],
    steps: ["The model's pass left a hidden state for every token.", "The layer reads state and next token, and predicts the state behind them; the LM head turns it into guesses.",
      "It goes on from its own states. The tree grows where guesses are likely.", ...verified(4).map((s) => s.text)],
  },
  {
    name: "eagle3", title: "EAGLE-3", paper: "Li et al. 2025",
    summary: "EAGLE that reads three layers of the model instead of the last one, and is trained on its own outputs, step after step.",
    properties: { "Trained": "one decoder layer and its own LM head, often of fewer words", "Reads": "hidden states of an early, a middle and a late layer", "Guesses": "level by level" },
    boxes: {
      root: ["token", 0, 2, "fox"], low: ["target", 1, 1, "early layers"], mid: ["target", 1, 2, "middle layers"], high: ["target", 1, 3, "late layers"], fuse: ["drafter", 2.5, 2, "fuse"],
      layer: ["drafter", 3.6, 2, "one layer"], one: ["token", 4.8, 1.2, "jumped, ran"], state: ["drafter", 4.8, 2.8, "own state"], again: ["drafter", 6, 2, "layer again"],
      two: ["token", 7.2, 2, "over, to"], ...passBoxes(8.4),
    },
    flows: [["root", "low", 1], ["low", "mid", 1], ["mid", "high", 1], ["low", "fuse", 2], ["mid", "fuse", 2], ["high", "fuse", 2], ["fuse", "layer", 3], ["layer", "one", 3], ["layer", "state", 3],
      ["one", "again", 4], ["state", "again", 4], ["again", "two", 4], ["two", "check", 5], ["check", "kept", 6], ["check", "own", 6], ["check", "wrong", 6]],
    steps: ["The root goes through the model.", "Three of its layers are tapped, and their hidden states fused into one.", "The layer guesses the next token.",
      "Deeper levels read the layer's own states, as they did in training.", ...verified(5).map((s) => s.text)],
  },
  {
    name: "mtp", title: "Multi-token prediction", paper: "DeepSeek-V3 2024; Gloeckle et al. 2024",
    summary: "A module that was trained together with the model: it reads a hidden state and the embedding of the next token, and shares embedding and LM head with the model.",
    properties: { "Trained": "with the model itself (DeepSeek-V3, GLM, MiMo, Qwen)", "Reads": "the last hidden state and the next token", "Guesses": "level by level" },
    boxes: {
      ...trunk, state: ["target", 3, 1.2, "hidden state"], token: ["token", 3, 2.8, "next token"], module: ["drafter", 4.3, 2, "module"], head: ["target", 5.5, 1.2, "shared LM head"],
      one: ["token", 6.9, 1.2, "jumped, ran"], next: ["drafter", 5.5, 2.8, "its state"], again: ["drafter", 7.1, 2.8, "module again"], two: ["token", 8.4, 2, "over, to"], ...passBoxes(9.6),
    },
    flows: [["root", "trunk", 1], ["trunk", "state", 1], ["trunk", "token", 1], ["state", "module", 2], ["token", "module", 2], ["module", "head", 3], ["head", "one", 3], ["module", "next", 3],
      ["next", "again", 4], ["one", "again", 4], ["again", "two", 4], ["two", "check", 5], ["check", "kept", 6], ["check", "own", 6], ["check", "wrong", 6]],
    steps: ["The pass that decided the last token left its hidden state.", "The module joins it with the embedding of the next token.", "The model's own LM head turns the module's state into guesses.",
      "The module goes on from its own states.", ...verified(5).map((s) => s.text)],
  },
];
