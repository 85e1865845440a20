/* ZooKeeper: messages with their length in front, numbers with the big end first ("jute").
 *
 * Every connection is a session. Each name is a node below the root.
 */
#include "load.h"

#include <string.h>

enum { OP_CREATE = 1, OP_GET_DATA = 4, OP_SET_DATA = 5, OP_CLOSE = -11 };
#define NODE "/svc-%N"
#define NODE_LENGTH 11

/* A message's length is known once it is whole: `end` puts it in front. */
static void begin(struct card *card, int operation) {
    card_number(card, 0, 4);
    card_add(card, "%X", 2);
    card_number(card, (uint32_t)operation, 4);
}

static void node(struct card *card) {
    card_number(card, NODE_LENGTH, 4);
    card_text(card, NODE);
}

static void data(struct card *card) {
    card_number(card, (uint32_t)value_card().length, 4);
    card_text(card, VALUE);
}

static void text(struct card *card, const char *word) {
    card_number(card, (uint32_t)strlen(word), 4);
    card_bytes(card, word, strlen(word));
}

static void end(struct card *card) {
    struct card length = {0};
    card_number(&length, (uint32_t)card->length - 4, 4);
    memcpy(card->bytes, length.bytes, 4);
}

static size_t take(struct connection *connection, const char *bytes, size_t length, struct answer *answer) {
    if (length < 4 || length < 4 + (size_t)number_at(bytes))
        return 0;
    size_t whole = 4 + (size_t)number_at(bytes);
    if (!connection->greeted) {
        answer->kind = GREETED;
        return whole;
    }
    if (whole < 20)
        die("a short reply from zookeeper");
    uint32_t tag = number_at(bytes + 4), error = number_at(bytes + 16);
    struct slot *slot = &connection->slots[tag % SLOTS];
    if (slot->asked.tag != tag)
        die("zookeeper answers %u, which nobody asked", tag);
    if (error != 0)
        die("zookeeper says error %d to svc-%06u", (int)error, slot->asked.key);
    *answer = (struct answer){ANSWER, tag % SLOTS, bytes + 20, whole - 20};
    return whole;
}

void make_zookeeper(struct protocol *zookeeper) {
    struct card *card = &zookeeper->greeting;
    zookeeper->take = take;
    card_number(card, 0, 4);
    card_number(card, 0, 4);     /* the version */
    card_number(card, 0, 4);     /* the last transaction seen, in eight bytes */
    card_number(card, 0, 4);
    card_number(card, 30000, 4); /* how many ms the session lives without a word */
    card_number(card, 0, 4);     /* no session before */
    card_number(card, 0, 4);
    card_number(card, 16, 4);    /* its password */
    for (int n = 0; n < 4; n++)
        card_number(card, 0, 4);
    card_number(card, 0, 1);     /* not read-only */
    end(card);

    begin(&zookeeper->request[READ], OP_GET_DATA);
    node(&zookeeper->request[READ]);
    card_number(&zookeeper->request[READ], 0, 1); /* no watch */
    end(&zookeeper->request[READ]);
    data(&zookeeper->reply[READ]);
    zookeeper->reply[READ].open_end = 1; /* what is known of the node */

    begin(&zookeeper->request[WRITE], OP_SET_DATA);
    node(&zookeeper->request[WRITE]);
    data(&zookeeper->request[WRITE]);
    card_number(&zookeeper->request[WRITE], (uint32_t)-1, 4); /* whatever its version */
    end(&zookeeper->request[WRITE]);
    zookeeper->reply[WRITE].open_end = 1;

    card = &zookeeper->request[CREATE];
    begin(card, OP_CREATE);
    node(card);
    data(card);
    card_number(card, 1, 4); /* one rule: all rights to everybody */
    card_number(card, 31, 4);
    text(card, "world");
    text(card, "anyone");
    card_number(card, 0, 4); /* it stays, and has no number */
    end(card);
    node(&zookeeper->reply[CREATE]);

    begin(&zookeeper->farewell, OP_CLOSE);
    end(&zookeeper->farewell);
}
