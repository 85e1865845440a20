/* Connections: opened, greeted, written to. */
#include "load.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

static int connect_to(int port) {
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        die("cannot connect to port %d: %s", port, strerror(errno));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return fd;
}

/* Open a connection, or open it again, and wait until the server has greeted, where it does. */
void dial(struct connection *connection, const struct protocol *protocol, int port) {
    const struct asked self = {.connection = connection->number};
    char greeting[CARD_BYTES];
    if (connection->slots == NULL) {
        connection->slots = calloc(SLOTS, sizeof *connection->slots);
        connection->input = malloc(INPUT_BYTES);
    }
    connection->fd = connect_to(port);
    connection->input_length = 0;
    connection->greeted = protocol->greeting.length == 0;
    if (!connection->greeted)
        say(connection, greeting, card_fill(&protocol->greeting, &self, greeting));
    while (!connection->greeted) {
        struct answer answer = {0};
        size_t taken = protocol->take(connection, connection->input, connection->input_length, &answer);
        if (taken == 0) {
            ssize_t more = recv(connection->fd, connection->input + connection->input_length,
                INPUT_BYTES - connection->input_length, 0);
            if (more <= 0)
                die("no greeting on connection %u", connection->number);
            connection->input_length += (size_t)more;
        }
        connection->greeted = answer.kind == GREETED;
        connection->input_length -= taken;
        memmove(connection->input, connection->input + taken, connection->input_length);
    }
}

/* What is sent is small beside a socket's buffer: one that takes no more belongs to a server that stopped reading. */
void say(struct connection *connection, const char *bytes, size_t length) {
    ssize_t sent = send(connection->fd, bytes, length, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent != (ssize_t)length)
        die("connection %u takes no more: %s", connection->number, sent < 0 ? strerror(errno) : "it is full");
}
