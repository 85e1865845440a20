/* epmd, the register of Erlang's nodes: one connection for each look-up, which epmd ends after its reply.
 *
 * A name lives as long as the connection that registered it. It has a port, and no value.
 */
#include "load.h"

#include <string.h>

enum { PORT_REQUEST = 122, PORT_REPLY = 119, ALIVE_REQUEST = 120, ALIVE_REPLY = 121, ALIVE_REPLY_NEW = 118 };
#define NAME_LENGTH 10
#define PORT_REPLY_BYTES (2 + 2 + 2 + 4 + 2 + NAME_LENGTH + 2)

static size_t take(struct connection *connection, const char *bytes, size_t length, struct answer *answer) {
    size_t whole = bytes[0] == PORT_REPLY ? PORT_REPLY_BYTES : bytes[0] == ALIVE_REPLY ? 4 : 6;
    if (length < 2)
        return 0;
    if (bytes[1] != 0)
        die("epmd refused a name: %d", bytes[1]);
    if (length < whole)
        return 0;
    *answer = (struct answer){ANSWER, connection->answered++ % SLOTS, bytes, whole};
    return whole;
}

static void node(struct card *card) {
    card_add(card, "%Q", 2);
    card_number(card, 77, 1); /* a node that can be seen */
    card_number(card, 0, 1);  /* over TCP */
    card_number(card, 6, 2);  /* versions, highest and lowest */
    card_number(card, 5, 2);
    card_number(card, NAME_LENGTH, 2);
    card_text(card, "svc-%N");
    card_number(card, 0, 2); /* nothing besides */
}

void make_epmd(struct protocol *epmd) {
    epmd->take = take;
    epmd->single = 1;
    card_number(&epmd->request[READ], 1 + NAME_LENGTH, 2);
    card_number(&epmd->request[READ], PORT_REQUEST, 1);
    card_text(&epmd->request[READ], "svc-%N");
    card_number(&epmd->reply[READ], PORT_REPLY, 1);
    card_number(&epmd->reply[READ], 0, 1);
    node(&epmd->reply[READ]);

    card_number(&epmd->request[CREATE], PORT_REPLY_BYTES - 2 + 1, 2);
    card_number(&epmd->request[CREATE], ALIVE_REQUEST, 1);
    node(&epmd->request[CREATE]);
    card_number(&epmd->reply[CREATE], ALIVE_REPLY_NEW, 1);
    card_number(&epmd->reply[CREATE], 0, 1);
    epmd->reply[CREATE].open_end = 1;
}
